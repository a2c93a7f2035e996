/* Calls every operator of the C interface as a C program does: on threads of its own, from several callers at a time, with
 * what must be refused. Prints "well". */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsifiner.h"

enum { kBatch = 2, kTokens = 131, kHeads = 2, kWidth = 20, kChannels = 5, kTile = 16, kKeys = 9, kMerged = 30 };
enum { kPacked = 3 * kHeads * kWidth, kTiles = (kTokens - 1 + kTile - 1) / kTile };

#define REQUIRE(what)                                          \
  do {                                                         \
    if (!(what)) {                                             \
      printf("line %d: %s: %s\n", __LINE__, #what, call.message); \
      exit(1);                                                 \
    }                                                          \
  } while (0)

struct Results {
  int32_t lists[kBatch * kHeads * kTiles * kKeys], pairs[kBatch * (kTokens - kMerged) * 2];
  float sparse[kBatch * kTokens * kHeads * kWidth], dense[kBatch * kTokens * kHeads * kWidth];
  float merged[kBatch * (kTokens - kMerged) * kHeads * kWidth];
};

static float qkv[kBatch * kTokens * kPacked], sizes[kBatch * kTokens], ones[kBatch * kTokens];
static float proj_q[kHeads * kWidth * kChannels], proj_k[kHeads * kWidth * kChannels];
static struct Results expected;
static sparsifiner_pool* pool;

static void fill(float* values, size_t count, unsigned seed) {
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
  }
}

#define COUNT(tensor) ((int64_t)(sizeof(tensor) / sizeof((tensor)[0])))
#define TENSOR(tensor) {tensor, COUNT(tensor)}
#define INPUTS(...) {TENSOR(qkv), {__VA_ARGS__}, kBatch, kTokens, kHeads, kWidth, 0.2f}

static void run(const float* token_sizes, sparsifiner_parallel_for loop, struct Results* to) {
  sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, loop, pool, ""};
  const sparsifiner_qkv in = INPUTS(token_sizes, COUNT(sizes)), sized = INPUTS(sizes, COUNT(sizes));
  const sparsifiner_select select = {1, 8, kTile, 20, kKeys, kChannels, 2.0f};
  const sparsifiner_attend attend = {1, kTile, 20, kKeys, 1};
  const sparsifiner_match match = {1, 16, kMerged};
  const sparsifiner_floats q = TENSOR(proj_q), k = TENSOR(proj_k);
  const sparsifiner_ints lists = TENSOR(to->lists);
  const sparsifiner_pairs merge = {TENSOR(to->dense),  TENSOR(sizes),   TENSOR(to->pairs),  kBatch,
                                   kTokens,            kHeads * kWidth, kTokens - kMerged};
  const sparsifiner_output to_lists = TENSOR(to->lists), to_sparse = TENSOR(to->sparse), to_dense = TENSOR(to->dense);
  const sparsifiner_output to_pairs = TENSOR(to->pairs), to_merged = TENSOR(to->merged);
  REQUIRE(sparsifiner_key_select(&call, &in, &select, q, k, to_lists) == SPARSIFINER_OK);
  REQUIRE(sparsifiner_sparse_attention(&call, &in, &attend, lists, to_sparse) == SPARSIFINER_OK);
  REQUIRE(sparsifiner_dense_attention(&call, &in, to_dense) == SPARSIFINER_OK);
  REQUIRE(sparsifiner_match_tokens(&call, &sized, &match, to_pairs) == SPARSIFINER_OK);
  REQUIRE(sparsifiner_merge_tokens(&call, &merge, to_merged) == SPARSIFINER_OK);
}

static void* caller(void* data) {
  struct Results* mine = malloc(sizeof(struct Results));
  for (int i = 0; i < 30; ++i) {
    run(ones, sparsifiner_pool_for, mine);
    if (memcmp(mine, &expected, sizeof(expected)) != 0) *(int*)data = 1;
  }
  free(mine);
  return NULL;
}

static void refused(void) {
  sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, NULL, NULL, ""};
  sparsifiner_qkv in = INPUTS(NULL, 0);
  sparsifiner_match match = {1, 16, kMerged};
  const sparsifiner_output asks = {NULL, 0}, pairs = TENSOR(expected.pairs);
  sparsifiner_output dense = TENSOR(expected.dense);
  REQUIRE(sparsifiner_match_tokens(&call, &in, &match, pairs) == SPARSIFINER_INVALID_ARGUMENT);
  REQUIRE(strcmp(call.message, "sizes has 0 elements, not 262") == 0);
  in.sizes.data = ones;
  in.sizes.count = COUNT(ones);
  in.qkv.data = NULL;
  REQUIRE(sparsifiner_dense_attention(&call, &in, asks) == SPARSIFINER_OK);
  REQUIRE(sparsifiner_dense_attention(&call, &in, dense) == SPARSIFINER_INVALID_ARGUMENT);
  REQUIRE(strcmp(call.message, "qkv is null") == 0);
  in.width = INT64_MIN;
  REQUIRE(sparsifiner_dense_attention(&call, &in, asks) == SPARSIFINER_INVALID_ARGUMENT);
  in.width = kWidth;
  in.batch = in.qkv.count = in.sizes.count = 0;
  REQUIRE(sparsifiner_dense_attention(&call, &in, dense) == SPARSIFINER_INVALID_ARGUMENT);
  REQUIRE(strstr(call.message, "output has ") != NULL);
  dense.count = 0;
  REQUIRE(sparsifiner_dense_attention(&call, &in, dense) == SPARSIFINER_OK);
  call.version = SPARSIFINER_VERSION + 1;
  REQUIRE(sparsifiner_dense_attention(&call, &in, dense) == SPARSIFINER_WRONG_VERSION);
  REQUIRE(sparsifiner_version() == SPARSIFINER_VERSION);
  REQUIRE(!sparsifiner_limit_target("no such set"));
  REQUIRE(strlen(sparsifiner_target()) > 0);
}

int main(void) {
  pthread_t callers[3];
  int wrong[3] = {0, 0, 0};
  static struct Results merged, alone;
  sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, NULL, NULL, ""};
  fill(qkv, sizeof(qkv) / sizeof(float), 1);
  fill(proj_q, sizeof(proj_q) / sizeof(float), 2);
  fill(proj_k, sizeof(proj_k) / sizeof(float), 3);
  for (size_t i = 0; i < sizeof(sizes) / sizeof(float); ++i) {
    ones[i] = 1.0f;
    sizes[i] = 1.0f + (float)(i % 4);
  }
  run(ones, NULL, &expected); /* nobody holds memory */
  pool = sparsifiner_pool_create(3);
  REQUIRE(pool != NULL);
  sparsifiner_hold_memory(1);
  for (int i = 0; i < 3; ++i) pthread_create(&callers[i], NULL, caller, &wrong[i]);
  for (int i = 0; i < 3; ++i) {
    pthread_join(callers[i], NULL);
    REQUIRE(!wrong[i]);
  }
  run(sizes, sparsifiner_pool_for, &merged);
  run(sizes, NULL, &alone);
  REQUIRE(memcmp(&merged, &alone, sizeof(alone)) == 0);
  REQUIRE(memcmp(merged.dense, expected.dense, sizeof(expected.dense)) != 0);
  sparsifiner_hold_memory(-1);
  sparsifiner_pool_destroy(pool);
  sparsifiner_pool_destroy(NULL);
  refused();
  puts("well");
  return 0;
}

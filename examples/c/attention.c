/* Compares sparse with dense attention of one layer, using only the C interface: no ONNX, no Python.
 *
 *     gcc -O2 attention.c -I FOLDER FOLDER/libsparsifiner_ops.so -Wl,-rpath,FOLDER -lm -o attention
 *     ./attention [THREADS]
 *
 * FOLDER contains sparsifiner.h and the library (`sparsifiner-edge doctor --json` prints it). THREADS is 2 by default.
 *
 * The sizes are those of ViT-S/14 at 518 px: one class token and 37 x 37 patches, 6 heads of 64 channels. The values
 * are random, so only the times are meaningful. The program prints the fastest of kRuns runs of each kind, and the
 * cosine similarity of the two outputs. */

#define _POSIX_C_SOURCE 199309L

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "sparsifiner.h"

enum { kPrefix = 1, kTokens = kPrefix + 37 * 37, kHeads = 6, kWidth = 64 }; /* the layer */
enum { kTile = 16, kKeys = 64, kQueryPool = 8, kKeyPool = 25, kChannels = 16 }; /* its sparsity, see sparsifiner.h */
enum { kTiles = (kTokens - kPrefix + kTile - 1) / kTile, kRuns = 20 };

static float random_value(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

/* Allocates `count` floats: random values in [-0.5, 0.5], or 1. */
static float* floats(size_t count, int random) {
  float* data = malloc(count * sizeof(float));
  if (data == NULL) exit(1);
  for (size_t i = 0; i < count; ++i) data[i] = random ? random_value() : 1.0f;
  return data;
}

/* Ends the program with the error message of a failed call. */
static void require(sparsifiner_status status, const sparsifiner_call* call) {
  if (status == SPARSIFINER_OK) return;
  fprintf(stderr, "%s\n", call->message);
  exit(1);
}

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

int main(int count, char** words) {
  const int threads = count > 1 ? atoi(words[1]) : 2;
  sparsifiner_pool* pool = threads > 0 ? sparsifiner_pool_create((size_t)threads) : NULL;
  if (pool == NULL) {
    fprintf(stderr, "usage: %s [THREADS]\n", words[0]);
    return 2;
  }
  sparsifiner_hold_memory(+1); /* Keep working memory between calls. */
  sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, sparsifiner_pool_for, pool, ""};

  const size_t inner = (size_t)kHeads * kWidth, projected = inner * kChannels, listed = (size_t)kHeads * kTiles * kKeys;
  float* qkv = floats(kTokens * 3 * inner, 1);
  float* sizes = floats(kTokens, 0);
  float* proj_q = floats(projected, 1);
  float* proj_k = floats(projected, 1);
  float* dense = floats(kTokens * inner, 0);
  float* sparse = floats(kTokens * inner, 0);
  int32_t* lists = malloc(listed * sizeof(int32_t));
  if (lists == NULL) return 1;

  const sparsifiner_qkv in = {{qkv, (int64_t)(kTokens * 3 * inner)}, {sizes, kTokens}, 1, kTokens, kHeads, kWidth, 0.125f};
  const sparsifiner_select select = {kPrefix, kQueryPool, kTile, kKeyPool, kKeys, kChannels, 1.0f};
  const sparsifiner_attend attend = {kPrefix, kTile, kKeyPool, kKeys, 1};
  const sparsifiner_floats q = {proj_q, (int64_t)projected}, k = {proj_k, (int64_t)projected};
  const sparsifiner_ints indices = {lists, (int64_t)listed};
  const sparsifiner_output to_lists = {lists, (int64_t)listed, 0};
  const sparsifiner_output to_dense = {dense, (int64_t)(kTokens * inner), 0}, to_sparse = {sparse, (int64_t)(kTokens * inner), 0};

  double best[2] = {1e9, 1e9};
  for (int run = 0; run < kRuns; ++run) {
    const double start = now_ms();
    require(sparsifiner_dense_attention(&call, &in, to_dense), &call);
    const double between = now_ms();
    require(sparsifiner_key_select(&call, &in, &select, q, k, to_lists), &call);
    require(sparsifiner_sparse_attention(&call, &in, &attend, indices, to_sparse), &call);
    const double end = now_ms();
    if (between - start < best[0]) best[0] = between - start;
    if (end - between < best[1]) best[1] = end - between;
  }
  double dot = 0, of_dense = 0, of_sparse = 0;
  for (size_t i = 0; i < kTokens * inner; ++i) {
    dot += (double)dense[i] * sparse[i];
    of_dense += (double)dense[i] * dense[i];
    of_sparse += (double)sparse[i] * sparse[i];
  }
  printf("%s, %d threads: dense %.2f ms, sparse %.2f ms, cosine %.3f\n", sparsifiner_target(), threads, best[0], best[1],
         dot / sqrt(of_dense * of_sparse));
  sparsifiner_hold_memory(-1);
  sparsifiner_pool_destroy(pool);
  free(qkv), free(sizes), free(proj_q), free(proj_k), free(dense), free(sparse), free(lists);
  return 0;
}

/* Runs recorded calls of the C interface, without ONNX Runtime: under sanitizers, or for another processor.
 *
 *     replay TARGET [THREADS]
 *
 * Standard input holds records: an operator, its arguments as the structures of sparsifiner.h, and its tensors; standard
 * output takes the raw result of each. Every buffer is its own allocation, exactly as long as its tensor, so that a
 * sanitizer sees the first element touched outside. With THREADS two callers at a time share a pool and the memory of
 * calls, and must agree. On an instruction set with bfloat16 attention runs in it. */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsifiner.h"

enum Operator { kDense, kCached, kSparse, kSelect, kMatch, kMerge };

static struct {
  int64_t op;
  sparsifiner_qkv in;
  sparsifiner_cache cache;
  sparsifiner_select select;
  sparsifiner_attend attend;
  sparsifiner_match match;
  sparsifiner_pairs pairs;
  sparsifiner_floats proj_q, proj_k;
  sparsifiner_ints lists;
  sparsifiner_output to;
} record;
static sparsifiner_pool* pool;

static void take(void* to, size_t bytes) {
  if (bytes != 0 && fread(to, bytes, 1, stdin) != 1) exit(3);
}

#define TAKE(x) take(&(x), sizeof(x))
#define TENSOR(x) (x).data = tensor(4 * (size_t)(x).count)

static void* tensor(size_t bytes) {
  void* data = malloc(bytes);
  if (data == NULL) exit(4);
  take(data, bytes);
  return data;
}

static void read_arguments(void) {
  if (record.op == kMerge) {
    TAKE(record.pairs);
    TAKE(record.to);
    TENSOR(record.pairs.x);
    TENSOR(record.pairs.sizes);
    TENSOR(record.pairs.pairs);
    return;
  }
  TAKE(record.in);
  if (record.op == kCached) TAKE(record.cache);
  if (record.op == kSparse) TAKE(record.attend);
  if (record.op == kSelect) TAKE(record.select);
  if (record.op == kMatch) TAKE(record.match);
  if (record.op == kSelect) TAKE(record.proj_q);
  if (record.op == kSelect) TAKE(record.proj_k);
  if (record.op == kSparse) TAKE(record.lists);
  TAKE(record.to);
  TENSOR(record.in.qkv);
  TENSOR(record.in.sizes);
  record.cache.cache.data = tensor((record.cache.halves ? 2 : 4) * (size_t)record.cache.cache.count);
  TENSOR(record.cache.counts);
  if (record.op == kSelect) TENSOR(record.proj_q);
  if (record.op == kSelect) TENSOR(record.proj_k);
  if (record.op == kSparse) TENSOR(record.lists);
}

static void free_tensors(void) {
  const void* const all[] = {record.in.qkv.data,  record.in.sizes.data,    record.pairs.x.data, record.pairs.sizes.data,
                             record.proj_q.data,  record.pairs.pairs.data, record.proj_k.data,  record.lists.data,
                             record.cache.cache.data, record.cache.counts.data};
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i) free((void*)all[i]);
  memset(&record, 0, sizeof(record));
}

static sparsifiner_status call_with(sparsifiner_call* call, sparsifiner_output to) {
  switch (record.op) {
    case kDense: return sparsifiner_dense_attention(call, &record.in, to);
    case kCached: return sparsifiner_cached_attention(call, &record.in, &record.cache, to);
    case kSparse: return sparsifiner_sparse_attention(call, &record.in, &record.attend, record.lists, to);
    case kSelect: return sparsifiner_key_select(call, &record.in, &record.select, record.proj_q, record.proj_k, to);
    case kMatch: return sparsifiner_match_tokens(call, &record.in, &record.match, to);
    default: return sparsifiner_merge_tokens(call, &record.pairs, to);
  }
}

/* Whether the same call gives the nearest bfloat16 of what it gave; of what is smaller than normal ones, zero will do. */
static int rounds(sparsifiner_call* call, sparsifiner_output exact) {
  const sparsifiner_output to = {malloc(2 * (size_t)exact.count), exact.count, 1};
  int right = to.data != NULL && call_with(call, to) == SPARSIFINER_OK;
  for (int64_t i = 0; right && i < exact.count; ++i) {
    const uint16_t got = ((const uint16_t*)to.data)[i];
    uint32_t bits;
    memcpy(&bits, (const float*)exact.data + i, sizeof(bits));
    right = (bits & 0x7fffffff) > 0x7f800000 ? (got & 0x7fff) > 0x7f80
            : got == (bits + 0x7fff + (bits >> 16 & 1)) >> 16 || ((bits & 0x7f800000) == 0 && (got & 0x7fff) == 0);
  }
  if (!right) fprintf(stderr, "rounded, it is not the nearest bfloat16\n");
  free(to.data);
  return right;
}

/* A caller: the record's result, in memory of its own. */
static void* run(void* unused) {
  const int halves = record.op <= kSparse && sparsifiner_has_bfloat16();
  sparsifiner_call call = {SPARSIFINER_VERSION, halves ? SPARSIFINER_BFLOAT16 : SPARSIFINER_FLOAT32,
                           pool ? sparsifiner_pool_for : NULL, pool, ""};
  sparsifiner_output to = record.to;
  to.data = malloc(4 * (size_t)to.count);
  if (to.data == NULL) exit(4);
  memset(to.data, 0xff, 4 * (size_t)to.count); /* NaN */
  if (call_with(&call, to) != SPARSIFINER_OK) {
    fprintf(stderr, "%s\n", call.message);
    exit(5);
  }
  if (record.op <= kSparse && !rounds(&call, to)) exit(8);
  (void)unused;
  return to.data;
}

int main(int argc, char** argv) {
  if (argc > 1 && *argv[1] && !sparsifiner_limit_target(argv[1])) return 2;
  if (argc > 2 && (pool = sparsifiner_pool_create((size_t)atoi(argv[2]))) == NULL) return 6;
  if (pool) sparsifiner_hold_memory(1);
  fprintf(stderr, "%s\n", sparsifiner_target());
  while (fread(&record.op, sizeof(record.op), 1, stdin) == 1) {
    pthread_t other;
    void *result, *again = NULL;
    read_arguments();
    if (pool && pthread_create(&other, NULL, run, NULL) != 0) return 6;
    result = run(NULL);
    if (pool) pthread_join(other, &again);
    if (pool && memcmp(result, again, 4 * (size_t)record.to.count) != 0) return 7;
    if (record.to.count != 0 && fwrite(result, 4 * (size_t)record.to.count, 1, stdout) != 1) return 4;
    free(result);
    free(again);
    free_tensors();
  }
  if (pool) sparsifiner_hold_memory(-1);
  sparsifiner_pool_destroy(pool);
  return 0;
}

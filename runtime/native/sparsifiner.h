/* The operators of the domain `sparsifiner` on plain pointers, for C and C++, and for whatever can call C.
 *
 * Shapes, symbols and attributes are those of docs/operators.md: tensors are dense, row-major float32 (indices and pairs:
 * int32), B images of N tokens, of which the first `num_prefix` are no patches, H heads of d channels. Each comes with the
 * number of its elements, and a call is refused where that is not what its sizes say. Indices outside of a tensor are
 * clamped into it: whatever they say, no memory is touched that is not the call's own.
 *
 *     sparsifiner_pool* pool = sparsifiner_pool_create(4);
 *     sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, sparsifiner_pool_for, pool, ""};
 *     sparsifiner_qkv in = {{qkv, 1370 * 1152}, {sizes, 1370}, 1, 1370, 6, 64, 0.125f};
 *     sparsifiner_output to = {output, 1370 * 384, 0};
 *     if (sparsifiner_dense_attention(&call, &in, to) != SPARSIFINER_OK) puts(call.message);
 *
 * Any number of threads may call at a time, each with a `sparsifiner_call` of its own. Nothing throws or prints. A given
 * operator, input and target give the same bits on any number of threads.
 */

#ifndef SPARSIFINER_H_
#define SPARSIFINER_H_

#include <stddef.h>
#include <stdint.h>

#define SPARSIFINER_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. A library of another version refuses every call: SPARSIFINER_WRONG_VERSION. */
#define SPARSIFINER_VERSION 5

enum {
  SPARSIFINER_OK = 0,
  SPARSIFINER_INVALID_ARGUMENT = 1, /* what the operators' specification refuses; nothing was computed */
  SPARSIFINER_OUT_OF_MEMORY = 2,    /* outputs are unspecified */
  SPARSIFINER_WRONG_VERSION = 3     /* header and library are of different versions */
};
typedef int32_t sparsifiner_status;

/* Of the library. */
SPARSIFINER_EXPORT int32_t sparsifiner_version(void);

/* Name of the instruction set that the kernels run on, such as "AVX3". */
SPARSIFINER_EXPORT const char* sparsifiner_target(void);

/* Lets the kernels use no better instruction set than the one named. 0: no such name, or not on this machine. */
SPARSIFINER_EXPORT int sparsifiner_limit_target(const char* name);

/* ---- Threads ---------------------------------------------------------------------------------------------------- */

/* Calls run(data, i) for every i in [0, count), in any order and on any threads, and returns when all are done. 0: it
 * could not, and some did not run. */
typedef int (*sparsifiner_parallel_for)(void* threads, size_t count, void (*run)(void* data, size_t i), void* data);

/* Threads of the library's own: `threads` of them, the caller's included. Null: none could be started. */
typedef struct sparsifiner_pool sparsifiner_pool;
SPARSIFINER_EXPORT sparsifiner_pool* sparsifiner_pool_create(size_t threads);

/* Ends them; no call may be running. Null is left alone. */
SPARSIFINER_EXPORT void sparsifiner_pool_destroy(sparsifiner_pool* pool);

/* A sparsifiner_parallel_for; `pool` is a sparsifiner_pool. Of several calls at a time one has the pool's threads, and
 * the others run on their callers'. */
SPARSIFINER_EXPORT int sparsifiner_pool_for(void* pool, size_t count, void (*run)(void* data, size_t i), void* data);

/* Memory of calls is kept for the next while there are holders: +1 adds one, -1 removes one. With none, calls ask the
 * system for memory. */
SPARSIFINER_EXPORT void sparsifiner_hold_memory(int holds);

/* ---- Calls ------------------------------------------------------------------------------------------------------ */

enum {
  SPARSIFINER_FLOAT32 = 0,
  /* Dense and sparse attention: queries, keys, values and weights of patches are rounded to bfloat16; sums and softmax,
   * rows of prefix tokens, lists of one query (tile 1, cell 0), and all other operators are float32. */
  SPARSIFINER_BFLOAT16 = 1
};
typedef int32_t sparsifiner_precision;

/* Whether the kernels' instruction set multiplies bfloat16. Where not, calls that ask for it are refused. */
SPARSIFINER_EXPORT int sparsifiner_has_bfloat16(void);

/* What a call runs on, and what went wrong in it. */
typedef struct sparsifiner_call {
  int32_t version;                       /* SPARSIFINER_VERSION */
  sparsifiner_precision precision;       /* of products */
  sparsifiner_parallel_for parallel_for; /* null: the calling thread alone */
  void* threads;                         /* handed to parallel_for */
  char message[512];                     /* written where a call is not SPARSIFINER_OK */
} sparsifiner_call;

/* A tensor, and how many elements it has. */
typedef struct sparsifiner_floats {
  const float* data;
  int64_t count;
} sparsifiner_floats;

typedef struct sparsifiner_ints {
  const int32_t* data;
  int64_t count;
} sparsifiner_ints;

/* Where a result goes: as many elements as it has, float32, or int32 of indices and pairs; of attention bfloat16 where it
 * is `rounded`. Null data asks whether the call would be refused for its settings, sizes and inputs' counts, and reads no
 * tensor. */
typedef struct sparsifiner_output {
  void* data;
  int64_t count;
  int64_t rounded; /* 0, or 1, of attention: the elements are bfloat16, the nearest */
} sparsifiner_output;

/* Queries, keys and values of every head: qkv [B, N, 3 * H * d], q|k|v along the last axis. */
typedef struct sparsifiner_qkv {
  sparsifiner_floats qkv;
  sparsifiner_floats sizes; /* [B, N]: patches that each token stands for; where all are 1 they cost nothing */
  int64_t batch, tokens, num_heads, width;
  float scale; /* of the logits */
} sparsifiner_qkv;

typedef struct sparsifiner_select {
  int64_t num_prefix, probe, tile, cell, keys, channels;
  float value_power;
} sparsifiner_select;

typedef struct sparsifiner_attend {
  int64_t num_prefix, tile, cell, keys, prefix_keys;
} sparsifiner_attend;

/* Of float32, or of float16 where they are `halves`. */
typedef struct sparsifiner_rows {
  const void* data;
  int64_t count;
} sparsifiner_rows;

/* Keys and values of other tokens, cache [B, tokens, 2 * H * d], k|v along the last axis, and what each counts as: counts
 * [B, tokens], 1, or 0 where it is not read. */
typedef struct sparsifiner_cache {
  sparsifiner_rows cache;
  sparsifiner_floats counts;
  int64_t tokens;
  int64_t halves; /* 0 or 1: the cache's elements are float16 */
} sparsifiner_cache;

typedef struct sparsifiner_match {
  int64_t num_prefix, window, merged;
} sparsifiner_match;

/* Tokens x [B, N, channels], their sizes [B, N], and pairs [B, M, 2] of them. */
typedef struct sparsifiner_pairs {
  sparsifiner_floats x, sizes;
  sparsifiner_ints pairs;
  int64_t batch, tokens, channels, merged_tokens;
} sparsifiner_pairs;

/* KeySelect: proj_q, proj_k [H, d, channels] -> indices [B, H, T, keys], T = ceil(P / tile). */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_key_select(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                             const sparsifiner_select* settings,
                                                             sparsifiner_floats proj_q, sparsifiner_floats proj_k,
                                                             sparsifiner_output indices);

/* SparseAttention: indices [B, H, T, keys] -> output [B, N, H * d]. */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_sparse_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                   const sparsifiner_attend* settings,
                                                                   sparsifiner_ints indices, sparsifiner_output output);

/* DenseAttention: output [B, N, H * d]. */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_dense_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                  sparsifiner_output output);

/* CachedAttention: over cached tokens too; `in` has no sizes (null, 0). Output [B, N, H * d]. */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_cached_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                   const sparsifiner_cache* cache,
                                                                   sparsifiner_output output);

/* MatchTokens: pairs [B, N - merged, 2]. */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_match_tokens(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                               const sparsifiner_match* settings,
                                                               sparsifiner_output pairs);

/* MergeTokens: output [B, M, channels]. */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_merge_tokens(sparsifiner_call* call, const sparsifiner_pairs* in,
                                                               sparsifiner_output output);

#ifdef __cplusplus
}
#endif

#endif /* SPARSIFINER_H_ */

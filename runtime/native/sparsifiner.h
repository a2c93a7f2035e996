/* C interface of the operators of the ONNX domain `sparsifiner`, on plain pointers.
 *
 * It is usable from C, C++ and any language that can call C. docs/operators.md specifies the operators, and the
 * library needs neither Python nor an inference runtime for these functions.
 *
 *     sparsifiner_pool* pool = sparsifiner_pool_create(4);
 *     sparsifiner_call call = {SPARSIFINER_VERSION, SPARSIFINER_FLOAT32, sparsifiner_pool_for, pool, ""};
 *     sparsifiner_qkv in = {{qkv, 1370 * 1152}, {sizes, 1370}, 1, 1370, 6, 64, 0.125f};
 *     sparsifiner_output to = {output, 1370 * 384, 0};
 *     if (sparsifiner_dense_attention(&call, &in, to) != SPARSIFINER_OK) puts(call.message);
 *
 * Notation, as in docs/operators.md:
 *
 *     B  batch size                        H  number of heads
 *     N  number of tokens                  d  channels per head
 *     P  number of patches, N - num_prefix T  number of query tiles, ceil(P / tile)
 *     K  number of selected keys           M  number of tokens after merging
 *     S  number of cached tokens           c  number of predictor channels
 *
 * Tensors are dense, row-major and float32, unless stated otherwise; indices and pairs are int32. The first num_prefix
 * tokens of an image (class, register and distillation tokens) are not patches.
 *
 * Safety:
 *   - Each tensor is passed with its number of elements. A call returns SPARSIFINER_INVALID_ARGUMENT if that number
 *     does not match the sizes.
 *   - Indices outside of a tensor are clamped to its range, so that no index makes a call access other memory.
 *   - No function throws an exception or prints.
 *   - Any number of threads may call at the same time, each with a sparsifiner_call of its own.
 *
 * For a given operator, input and target, the result has the same bits on any number of threads.
 */

#ifndef SPARSIFINER_H_
#define SPARSIFINER_H_

#include <stddef.h>
#include <stdint.h>

#define SPARSIFINER_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this header. A library of another version rejects every call with SPARSIFINER_WRONG_VERSION. */
#define SPARSIFINER_VERSION 5

/* Result of a call. */
enum {
  SPARSIFINER_OK = 0,
  SPARSIFINER_INVALID_ARGUMENT = 1, /* the arguments violate the specification; nothing was computed */
  SPARSIFINER_OUT_OF_MEMORY = 2,    /* the contents of the output are unspecified */
  SPARSIFINER_WRONG_VERSION = 3     /* header and library have different versions; nothing was computed */
};
typedef int32_t sparsifiner_status;

/* Returns the version of the library, to be compared with SPARSIFINER_VERSION. */
SPARSIFINER_EXPORT int32_t sparsifiner_version(void);

/* Returns the name of the instruction set that the kernels use, for instance "AVX3". The string is static. */
SPARSIFINER_EXPORT const char* sparsifiner_target(void);

/* Selects the instruction set with this name for all later calls, for tests and comparisons. By default the kernels use
 * the best one. Returns 1, or 0 (and changes nothing) if the name is unknown or this machine lacks the set. */
SPARSIFINER_EXPORT int sparsifiner_limit_target(const char* name);

/* ---- Threads ---------------------------------------------------------------------------------------------------- */

/* Parallel loop supplied by the caller. It calls run(data, i) once for every i in [0, count), in any order and on any
 * threads, and returns after the last one has finished. `threads` is sparsifiner_call.threads. Returns nonzero, or 0 if
 * some of the items did not run; the operator then returns SPARSIFINER_OUT_OF_MEMORY. */
typedef int (*sparsifiner_parallel_for)(void* threads, size_t count, void (*run)(void* data, size_t i), void* data);

/* Thread pool of the library, for callers without one of their own. */
typedef struct sparsifiner_pool sparsifiner_pool;

/* Creates a pool that runs loops on `threads` threads, including the calling thread. Returns null if memory runs out or
 * a thread cannot be started. Release it with sparsifiner_pool_destroy. */
SPARSIFINER_EXPORT sparsifiner_pool* sparsifiner_pool_create(size_t threads);

/* Stops the threads of a pool and releases it. No call may be using the pool. Null is allowed and does nothing. */
SPARSIFINER_EXPORT void sparsifiner_pool_destroy(sparsifiner_pool* pool);

/* Runs a loop on a pool. Pass this function as sparsifiner_call.parallel_for and the sparsifiner_pool as
 * sparsifiner_call.threads. If several calls use a pool at the same time, one of them gets its threads and the others
 * run on their calling thread. Always returns 1. */
SPARSIFINER_EXPORT int sparsifiner_pool_for(void* pool, size_t count, void (*run)(void* data, size_t i), void* data);

/* Adds `holds` (+1 or -1) to the number of holders of the library's working memory. While there is at least one holder,
 * calls keep their working memory for later calls. Without a holder, each call allocates and frees its own. */
SPARSIFINER_EXPORT void sparsifiner_hold_memory(int holds);

/* ---- Calls ------------------------------------------------------------------------------------------------------ */

/* Precision of the products in dense, sparse and cached attention. */
enum {
  SPARSIFINER_FLOAT32 = 0,
  /* Queries, keys, values and attention weights are rounded to bfloat16. Sums and softmax stay float32. In sparse
   * attention, so do the rows of prefix tokens, and all rows if tile is 1 and key_pool is 0. KeySelect, MatchTokens and
   * MergeTokens always compute in float32. */
  SPARSIFINER_BFLOAT16 = 1
};
typedef int32_t sparsifiner_precision;

/* Returns 1 if the selected instruction set has bfloat16 products, else 0. If it has none, calls with
 * SPARSIFINER_BFLOAT16 return SPARSIFINER_INVALID_ARGUMENT. */
SPARSIFINER_EXPORT int sparsifiner_has_bfloat16(void);

/* Settings of a call, and its error message. It can be reused for any number of calls, one at a time. */
typedef struct sparsifiner_call {
  int32_t version;                       /* SPARSIFINER_VERSION */
  sparsifiner_precision precision;       /* precision of the products in attention */
  sparsifiner_parallel_for parallel_for; /* parallel loop; null: run on the calling thread */
  void* threads;                         /* first argument of parallel_for */
  char message[512];                     /* error message, written unless the call returns SPARSIFINER_OK */
} sparsifiner_call;

/* Float32 input. */
typedef struct sparsifiner_floats {
  const float* data;
  int64_t count; /* number of elements */
} sparsifiner_floats;

/* Int32 input. */
typedef struct sparsifiner_ints {
  const int32_t* data;
  int64_t count; /* number of elements */
} sparsifiner_ints;

/* Output, allocated by the caller. The elements are int32 for indices and pairs, and else float32, or bfloat16 if
 * `rounded` is 1.
 *
 * If data is null, the call is a dry run: it validates the settings, the sizes and the element counts of the inputs,
 * and returns without reading a tensor. */
typedef struct sparsifiner_output {
  void* data;
  int64_t count;   /* number of elements; ignored in a dry run */
  int64_t rounded; /* attention only: 1 rounds the result to the nearest bfloat16; otherwise 0 */
} sparsifiner_output;

/* Queries, keys and values of all heads, after bias, qk-norm and rotary embedding. */
typedef struct sparsifiner_qkv {
  sparsifiner_floats qkv;   /* [B, N, 3 * H * d], the last axis is the concatenation of q, k and v, each H x d */
  sparsifiner_floats sizes; /* [B, N], number of patches that each token represents; all 1 if no token was merged,
                             * which takes a faster path */
  int64_t batch;            /* B */
  int64_t tokens;           /* N */
  int64_t num_heads;        /* H */
  int64_t width;            /* d */
  float scale;              /* scale of the logits, normally 1 / sqrt(d); unused by MatchTokens */
} sparsifiner_qkv;

/* Attributes of KeySelect. */
typedef struct sparsifiner_select {
  int64_t num_prefix; /* number of tokens before the patches */
  int64_t query_pool; /* number of consecutive patch queries averaged into one pooled query; divides tile */
  int64_t tile;       /* number of consecutive patch queries that share one key list */
  int64_t key_pool;   /* number of consecutive patches averaged into one background token; 0: no background tokens */
  int64_t keys;       /* K, number of keys selected for each tile; at most P */
  int64_t channels;   /* c, number of channels of the low-rank predictor */
  float value_power;  /* weight of the value deviation in the score; 0: unused */
} sparsifiner_select;

/* Attributes of SparseAttention. */
typedef struct sparsifiner_attend {
  int64_t num_prefix;  /* number of tokens before the patches */
  int64_t tile;        /* number of consecutive patch queries that share one key list */
  int64_t key_pool;    /* number of consecutive patches averaged into one background token; 0: no background tokens */
  int64_t keys;        /* K, number of keys in each list */
  int64_t prefix_keys; /* 1: patch queries also attend to the prefix tokens, and indices count patches; 0: indices count
                        * all tokens, and tile must be 1 and key_pool 0 */
} sparsifiner_attend;

/* Float32 or float16 input. */
typedef struct sparsifiner_rows {
  const void* data;
  int64_t count; /* number of elements */
} sparsifiner_rows;

/* Cached keys and values of S other tokens. */
typedef struct sparsifiner_cache {
  sparsifiner_rows cache;    /* [B, S, 2 * H * d], the last axis is the concatenation of k and v */
  sparsifiner_floats counts; /* [B, S], weight of each cached token: 1, or 0 if it is ignored */
  int64_t tokens;            /* S, at least 1 */
  int64_t halves;            /* type of the elements of `cache`: 0 for float32, 1 for float16 */
} sparsifiner_cache;

/* Attributes of MatchTokens. */
typedef struct sparsifiner_match {
  int64_t num_prefix; /* number of tokens before the patches; they are never merged */
  int64_t window;     /* number of candidate partners of a token along the token order; even */
  int64_t merged;     /* number of pairs to merge; at most half of the patches */
} sparsifiner_match;

/* Input of MergeTokens. */
typedef struct sparsifiner_pairs {
  sparsifiner_floats x;     /* [B, N, channels], tokens before merging */
  sparsifiner_floats sizes; /* [B, N], number of patches that each token represents */
  sparsifiner_ints pairs;   /* [B, M, 2], the two tokens that form each new token; equal if it was not merged */
  int64_t batch;            /* B */
  int64_t tokens;           /* N */
  int64_t channels;         /* channels of a token */
  int64_t merged_tokens;    /* M */
} sparsifiner_pairs;

/* Selects the K keys that the queries of each tile attend to (KeySelect).
 *
 *     proj_q   [H, d, c], low-rank projection of the pooled queries
 *     proj_k   [H, d, c], low-rank projection of the keys
 *     indices  output [B, H, T, K], patch indices, strictly ascending */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_key_select(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                             const sparsifiner_select* settings,
                                                             sparsifiner_floats proj_q, sparsifiner_floats proj_k,
                                                             sparsifiner_output indices);

/* Attends to the prefix tokens, the listed keys and one background token per key pool (SparseAttention). Prefix queries
 * attend to all tokens.
 *
 *     indices  [B, H, T, K], key list of each tile
 *     output   output [B, N, H * d] */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_sparse_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                   const sparsifiner_attend* settings,
                                                                   sparsifiner_ints indices, sparsifiner_output output);

/* Attends to all tokens (DenseAttention).
 *
 *     output   output [B, N, H * d] */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_dense_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                  sparsifiner_output output);

/* Attends to all tokens of `in` and to the cached tokens (CachedAttention). `in` has no sizes: pass {NULL, 0}.
 *
 *     output   output [B, N, H * d] */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_cached_attention(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                                   const sparsifiner_cache* cache,
                                                                   sparsifiner_output output);

/* Selects the pairs of tokens to merge, by the similarity of their keys (MatchTokens).
 *
 *     pairs    output [B, N - merged, 2], the two tokens that form each new token; equal if it is not merged */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_match_tokens(sparsifiner_call* call, const sparsifiner_qkv* in,
                                                               const sparsifiner_match* settings,
                                                               sparsifiner_output pairs);

/* Replaces each pair of tokens by its mean, weighted by size (MergeTokens).
 *
 *     output   output [B, M, channels] */
SPARSIFINER_EXPORT sparsifiner_status sparsifiner_merge_tokens(sparsifiner_call* call, const sparsifiner_pairs* in,
                                                               sparsifiner_output output);

#ifdef __cplusplus
}
#endif

#endif /* SPARSIFINER_H_ */

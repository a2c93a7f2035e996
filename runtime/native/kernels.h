// Kernels of the operators, on plain buffers and independent of any inference runtime.
//
// Shapes and symbols are those of ops/schema.py; ops/reference.py is the specification. Indices outside of a tensor are
// clamped to its range, so that no index makes a kernel access other memory.
//
// Kernels never throw, and get their memory from the Call. They return false if memory runs out; the output is then
// unspecified. A batch of 0 is allowed.

#ifndef SPARSIFINER_KERNELS_H_
#define SPARSIFINER_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "call.h"
#include "sparsifiner.h"

namespace sparsifiner {

// Returns the number of groups of up to `each` elements that `count` elements form.
constexpr size_t Groups(size_t count, size_t each) { return (count + each - 1) / each; }

// Queries, keys and values in one tensor, qkv [batch, tokens, 3 * heads * width], and its dimensions.
struct Packed {
  const float* qkv;
  size_t batch;
  size_t tokens;
  size_t heads;
  size_t width;  // d, channels of a head
  float scale;
  const float* sizes = nullptr;  // [batch, tokens]: patches that each token represents; null: 1

  // Returns the number of floats between tokens.
  size_t Row() const { return 3 * heads * width; }
  // Returns the queries (part 0), keys (1) or values (2) of a head. Heads are numbered across the images of the batch.
  const float* Rows(size_t head, size_t part) const {
    return qkv + head / heads * tokens * Row() + (part * heads + head % heads) * width;
  }
};

// Cached keys and values, rows [batch, tokens, 2 * heads * width], and their weights, counts [batch, tokens]. Empty by
// default.
struct Cache {
  const void* rows = nullptr;
  const float* counts = nullptr;
  size_t tokens = 0;
  bool halves = false;  // rows are float16 instead of float32
};

struct SparseSettings {
  size_t prefix;       // tokens before the patches
  size_t prefix_keys;  // prefix tokens that patch queries attend to: all (prefix) or none (0)
  size_t tile;
  size_t key_pool;  // 0: no background tokens
  size_t keys;  // K
};

struct SelectSettings {
  size_t prefix;
  size_t query_pool;
  size_t tile;
  size_t key_pool;
  size_t keys;
  size_t channels;  // c
  float value_power;
};

struct MatchSettings {
  size_t prefix;
  size_t window;
  size_t merged;
};

// Input of MergeTokens: x [batch, tokens, channels], sizes [batch, tokens], pairs [batch, count, 2].
struct Merging {
  const float* x;
  const float* sizes;
  const int32_t* pairs;
  size_t batch;
  size_t tokens;
  size_t channels;
  size_t count;
};

// Output of attention, float32 or (if rounded) bfloat16.
struct Output {
  void* data;
  bool rounded;

  // Returns the output from an element on.
  Output From(size_t index) const { return {static_cast<char*>(data) + index * (rounded ? 2 : 4), rounded}; }
};

// Kernels of attention with products in one precision. Output: output [batch, tokens, heads * width].
struct Attention {
  // softmax(scale q k^T) v over all tokens, including cached ones.
  bool (*dense)(const Packed& in, const Cache& cache, const Output& output, const Call& call);

  // Attention over listed keys and background tokens: indices [batch, heads, tiles, keys].
  bool (*sparse)(const Packed& in, const int32_t* indices, const SparseSettings& settings, const Output& output,
                 const Call& call);
};

// Returns the kernels for a precision, or null if the instruction set has no products in this precision.
const Attention* FindAttention(sparsifiner_precision precision);

// Selects keys: proj_q, proj_k [heads, width, channels] -> indices [batch, heads, tiles, keys], ascending.
[[nodiscard]] bool KeySelect(const Packed& in, const float* proj_q, const float* proj_k,
                             const SelectSettings& settings, int32_t* indices, const Call& call);

// Selects the tokens to merge: pairs [batch, tokens - merged, 2]. Needs in.sizes.
[[nodiscard]] bool MatchTokens(const Packed& in, const MatchSettings& settings, int32_t* pairs,
                               const Call& call);

// Merges pairs of tokens: output [batch, count, channels].
[[nodiscard]] bool MergeTokens(const Merging& in, float* output, const Call& call);

}  // namespace sparsifiner

#endif  // SPARSIFINER_KERNELS_H_

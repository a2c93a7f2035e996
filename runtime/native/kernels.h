// The operators' kernels, free of ONNX Runtime: plain float32 buffers in, plain buffers out.
//
// Shapes and symbols are those of ops/schema.py; ops/reference.py is the specification. Indices outside a tensor are
// clamped into it: whatever they say, no kernel touches memory that is not its own.
//
// Kernels never throw, and get all memory from outside. Those that need any return false where there is not enough; their
// output is then unspecified. A batch of 0 is no work.

#ifndef SPARSIFINER_KERNELS_H_
#define SPARSIFINER_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "call.h"
#include "sparsifiner.h"

namespace sparsifiner {

// Groups of up to `each` that `count` make.
constexpr size_t Groups(size_t count, size_t each) { return (count + each - 1) / each; }

// Packed queries, keys and values, with their dimensions: qkv [batch, tokens, 3 * heads * width].
struct Packed {
  const float* qkv;
  size_t batch;
  size_t tokens;
  size_t heads;
  size_t width;  // d, channels of a head
  float scale;
  const float* sizes = nullptr;  // [batch, tokens]: how many patches each token stands for; null: one

  size_t Row() const { return 3 * heads * width; }
  // The queries (part 0), keys (1) or values (2) of a head; heads are counted through all images.
  const float* Rows(size_t head, size_t part) const {
    return qkv + head / heads * tokens * Row() + (part * heads + head % heads) * width;
  }
};

// Keys and values of other tokens: rows [batch, tokens, 2 * heads * width], and what each counts as, [batch, tokens]; or none.
struct Cache {
  const void* rows = nullptr;
  const float* counts = nullptr;
  size_t tokens = 0;
  bool halves = false;  // rows of float16, not of float32
};

struct SparseSettings {
  size_t prefix;       // leading tokens that are no patches
  size_t prefix_keys;  // of them, how many every patch query reads (prefix or 0)
  size_t tile;
  size_t key_pool;  // 0: no background pools
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

// Tokens that are merged: x [batch, tokens, channels], sizes [batch, tokens], pairs [batch, count, 2].
struct Merging {
  const float* x;
  const float* sizes;
  const int32_t* pairs;
  size_t batch;
  size_t tokens;
  size_t channels;
  size_t count;
};

// Where attention's output goes: elements of float32, or of bfloat16 where they are rounded.
struct Output {
  void* data;
  bool rounded;

  // From an element on.
  Output From(size_t index) const { return {static_cast<char*>(data) + index * (rounded ? 2 : 4), rounded}; }
};

// Attention with products in one precision: output [batch, tokens, heads * width].
struct Attention {
  // softmax(scale q k^T) v, over cached tokens too.
  bool (*dense)(const Packed& in, const Cache& cache, const Output& output, const Call& call);

  // The same over listed keys: indices [batch, heads, tiles, keys].
  bool (*sparse)(const Packed& in, const int32_t* indices, const SparseSettings& settings, const Output& output,
                 const Call& call);
};

// Null: the instruction set has no products in this precision.
const Attention* FindAttention(sparsifiner_precision precision);

// proj_q, proj_k [heads, width, channels] -> indices [batch, heads, tiles, keys], ascending.
[[nodiscard]] bool KeySelect(const Packed& in, const float* proj_q, const float* proj_k,
                             const SelectSettings& settings, int32_t* indices, const Call& call);

// pairs [batch, tokens - merged, 2]: which tokens become one; needs in.sizes.
[[nodiscard]] bool MatchTokens(const Packed& in, const MatchSettings& settings, int32_t* pairs,
                               const Call& call);

// output [batch, count, channels].
[[nodiscard]] bool MergeTokens(const Merging& in, float* output, const Call& call);

}  // namespace sparsifiner

#endif  // SPARSIFINER_KERNELS_H_

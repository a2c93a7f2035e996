// The operators' kernels, free of ONNX Runtime: plain float32 buffers in, plain buffers out.
//
// Shapes and symbols are those of ops/schema.py; ops/reference.py is the specification. Indices outside a tensor are
// clamped into it: whatever they say, no kernel touches memory that is not its own.
//
// Kernels never throw, and get all memory from outside. Those that need any are false where there is not enough; their
// output is then unspecified. A batch of 0 is no work.

#ifndef SPARSIFINER_KERNELS_H_
#define SPARSIFINER_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace sparsifiner {

// What a kernel runs on.
struct Parallel {
  // `bytes` (not 0) of memory for the whole call, aligned to a cache line, or null. Once per call.
  virtual void* Shared(size_t bytes) const = 0;

  // Runs fn(data, i, own) for i in [0, count), in any order and on any threads; returns when all are done. `own` are
  // `bytes` of memory, aligned to a cache line, that fn has to itself until it returns; null for 0 bytes. False: there
  // was not enough memory, and fn did not run for every i.
  virtual bool For(size_t count, size_t bytes, void (*fn)(void* data, size_t i, void* own), void* data) const = 0;

 protected:
  ~Parallel() = default;
};

// Sizes of packed queries, keys and values: qkv [batch, tokens, 3 * heads * width].
struct Packed {
  const float* qkv;
  size_t batch;
  size_t tokens;
  size_t heads;
  size_t width;  // d, channels of a head
  float scale;
  const float* sizes = nullptr;  // [batch, tokens]: how many tokens each stands for; null: one

  size_t Row() const { return 3 * heads * width; }
  const float* Queries(size_t b, size_t h) const { return qkv + b * tokens * Row() + h * width; }
  const float* Keys(size_t b, size_t h) const { return Queries(b, h) + heads * width; }
  const float* Values(size_t b, size_t h) const { return Queries(b, h) + 2 * heads * width; }
};

struct SparseSettings {
  size_t prefix;       // leading tokens that are no patches
  size_t prefix_keys;  // of them, how many every patch query reads (prefix or 0)
  size_t tile;
  size_t cell;  // 0: no background cells
  size_t keys;  // K
};

struct SelectSettings {
  size_t prefix;
  size_t probe;
  size_t tile;
  size_t cell;
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

// softmax(scale q k^T) v: output [batch, tokens, heads * width].
[[nodiscard]] bool DenseAttention(const Packed& in, float* output, const Parallel& parallel);

// indices [batch, heads, tiles, keys] -> output [batch, tokens, heads * width].
[[nodiscard]] bool SparseAttention(const Packed& in, const int32_t* indices, const SparseSettings& settings,
                                   float* output, const Parallel& parallel);

// The same, products of patches in bfloat16, where `HasBf16` (else in float32).
[[nodiscard]] bool DenseAttentionBf16(const Packed& in, float* output, const Parallel& parallel);
[[nodiscard]] bool SparseAttentionBf16(const Packed& in, const int32_t* indices, const SparseSettings& settings,
                                       float* output, const Parallel& parallel);

// proj_q, proj_k [heads, width, channels] -> indices [batch, heads, tiles, keys], ascending.
[[nodiscard]] bool KeySelect(const Packed& in, const float* proj_q, const float* proj_k,
                             const SelectSettings& settings, int32_t* indices, const Parallel& parallel);

// pairs [batch, tokens - merged, 2]: which tokens become one; needs in.sizes.
[[nodiscard]] bool MatchTokens(const Packed& in, const MatchSettings& settings, int32_t* pairs,
                               const Parallel& parallel);

// output [batch, count, channels].
[[nodiscard]] bool MergeTokens(const Merging& in, float* output, const Parallel& parallel);

// Name of the instruction set that the kernels run on, such as "AVX3".
const char* TargetName();

// Whether the instruction set multiplies bfloat16.
bool HasBf16();

// Lets the kernels use no better instruction set than the one named. False: no such name, or not on this machine.
bool LimitTarget(const char* name);

}  // namespace sparsifiner

#endif  // SPARSIFINER_KERNELS_H_

// DenseAttention in float32 (ops/schema.py).

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "dense.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "dense-inl.h"
#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// DenseAttention in float32 (dense-inl.h).
struct Floats {
  using Word = float;
  struct Session {};

  static size_t RowWords(size_t width) { return PackedWidth(width); }
  static size_t Stride(size_t width) { return PackedWidth(width); }

  static void PackQueries(const float* const* rows, size_t width, float factor, float* /*turned*/, float* qt) {
    Transpose16(rows, width, factor, qt);
  }

  static void PackChunk(const float* keys, const float* values, size_t row, size_t width, size_t count,
                        const GroupWork<float>& work) {
    const size_t stride = Stride(width);
    for (size_t j = 0; j < count; ++j) {
      const size_t ahead = std::min(j + kRowsAhead, count - 1) * row;
      FetchRow(keys + ahead, width);
      FetchRow(values + ahead, width);
      PackRow(keys + j * row, width, stride, work.keys + j * stride);
      PackRow(values + j * row, width, stride, work.values + j * stride);
    }
  }

  static void Scores(const float* qt, const float* keys, size_t width, size_t count, float* scores) {
    HWY_NAMESPACE::Scores<true>(qt, keys, Stride(width), width, count, scores);
  }

  // Of the keys j and j + 1; room for one more key is there.
  static void KeepWeights(V a, V b, size_t j, size_t v, const GroupWork<float>& work) {
    hn::Store(a, D(), work.scores + j * kQueries + v);
    hn::Store(b, D(), work.scores + (j + 1) * kQueries + v);
  }

  static void AddSums(const GroupWork<float>& work, size_t count, size_t stride, const float* carry, float* sums) {
    const Weighted part{work.scores, work.values, count, nullptr};
    Accumulate<true, true>(&part, 1, stride, sums, carry, nullptr, kQueries, stride, sums, stride);
  }
};

bool DenseAttentionTarget(const Packed& in, float* output, const Parallel& parallel) {
  return AttendDensely<Floats>(in, output, parallel);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool DenseAttention(const Packed& in, float* output, const Parallel& parallel) {
  return SPARSIFINER_BUILT(DenseAttentionTarget)(in, output, parallel);
}

}  // namespace sparsifiner
#endif

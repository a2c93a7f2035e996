// DenseAttention in float32, and TokenScore (ops/schema.py).

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

// ---------------------------------------------------------------------------------------------------------------------
// TokenScore: what the class token attends to.

struct ScoreJob {
  Packed in;
  float* rows;  // [batch][heads][tokens]: each head's share of the mean
};

HWY_NOINLINE void ScoreHead(void* data, size_t item, void*) {
  const ScoreJob& job = *static_cast<const ScoreJob*>(data);
  const Packed& in = job.in;
  const D d;
  const size_t head = item % in.heads, batch = item / in.heads;
  float* weights = job.rows + item * in.tokens;
  const auto at = [](size_t j) { return j; };
  const float total = WeighOne(in.Queries(batch, head), in.Keys(batch, head), in.Row(), at, in.tokens, in.scale,
                               in.width, nullptr, weights);
  const V share = hn::Set(d, 1.0f / (total * static_cast<float>(in.heads)));
  for (size_t j = 0; j < in.tokens; j += kLanes) {
    const size_t some = std::min(kLanes, in.tokens - j);
    hn::StoreN(hn::Mul(share, hn::LoadN(d, weights + j, some)), d, weights + j, some);
  }
}

bool TokenScoreTarget(const Packed& in, float* output, const Parallel& parallel) {
  if (in.batch == 0) return true;
  ScoreJob job{in, nullptr};
  job.rows = static_cast<float*>(parallel.Shared(Times(Times(in.batch * in.heads, in.tokens), sizeof(float))));
  if (job.rows == nullptr || !parallel.For(in.batch * in.heads, 0, ScoreHead, &job)) return false;
  const D d;
  for (size_t b = 0; b < in.batch; ++b) {
    const float* rows = job.rows + b * in.heads * in.tokens;
    for (size_t j = 0; j < in.tokens; j += kLanes) {
      const size_t some = std::min(kLanes, in.tokens - j);
      V sum = hn::Zero(d);
      for (size_t h = 0; h < in.heads; ++h) sum = hn::Add(sum, hn::LoadN(d, rows + h * in.tokens + j, some));
      hn::StoreN(sum, d, output + b * in.tokens + j, some);
    }
  }
  return true;
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool DenseAttention(const Packed& in, float* output, const Parallel& parallel) {
  return SPARSIFINER_BUILT(DenseAttentionTarget)(in, output, parallel);
}

bool TokenScore(const Packed& in, float* output, const Parallel& parallel) {
  return SPARSIFINER_BUILT(TokenScoreTarget)(in, output, parallel);
}

}  // namespace sparsifiner
#endif

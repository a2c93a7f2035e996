// DenseAttention (ops/schema.py): tiles of 16 queries share chunks of packed keys and values; softmax is carried from
// chunk to chunk, so that no score matrix is larger than one tile's of one chunk.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "dense.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

constexpr size_t kDenseTiles = 16;
constexpr size_t kDenseKeys = 64;

struct DenseJob {
  Packed in;
  float* output;
  size_t groups;      // of kDenseTiles tiles, per head
  const float* bias;  // [batch][tokens]: log2 of sizes, or null
};

// What a thread needs for one group.
struct DenseWork {
  float *qt, *keys, *values, *scores, *sums, *state;
};

HWY_INLINE size_t LayOut(const DenseJob& job, void* base, DenseWork* work) {
  const size_t tiles = std::min(kDenseTiles, (job.in.tokens + kQueries - 1) / kQueries);
  const size_t stride = PackedWidth(job.in.width);
  Layout layout(base);
  work->qt = layout.Take<float>(tiles, job.in.width, kQueries);
  work->keys = layout.Take<float>(kDenseKeys, stride);
  work->values = layout.Take<float>(kDenseKeys, stride);
  work->scores = layout.Take<float>(kDenseKeys, kQueries);
  work->sums = layout.Take<float>(tiles, kQueries, stride);
  work->state = layout.Take<float>(tiles, 2 * kQueries);
  return layout.used();
}

HWY_NOINLINE void DenseGroup(void* data, size_t item, void* own) {
  const DenseJob& job = *static_cast<const DenseJob*>(data);
  const Packed& in = job.in;
  const D d;
  const size_t group = item % job.groups, head = item / job.groups % in.heads, batch = item / job.groups / in.heads;
  const size_t begin = group * kDenseTiles * kQueries;
  const size_t queries = std::min(in.tokens - begin, kDenseTiles * kQueries);
  const size_t tiles = (queries + kQueries - 1) / kQueries;
  const size_t width = in.width, stride = PackedWidth(width), row = in.Row();
  const float* q = in.Queries(batch, head) + begin * row;
  float* output = job.output + ((batch * in.tokens + begin) * in.heads + head) * width;

  DenseWork work;
  LayOut(job, own, &work);
  float *qt = work.qt, *keys = work.keys, *values = work.values, *scores = work.scores;
  float *sums = work.sums, *state = work.state;
  for (size_t t = 0; t < tiles; ++t) {
    const float* rows[kQueries];
    QueryRows(q + t * kQueries * row, row, std::min(kQueries, queries - t * kQueries), rows);
    Transpose16(rows, width, in.scale * kLog2e, qt + t * width * kQueries);
    for (size_t v = 0; v < kQueries; v += kLanes) {
      hn::Store(hn::Set(d, kLowest), d, state + 2 * t * kQueries + v);
      hn::Store(hn::Zero(d), d, state + (2 * t + 1) * kQueries + v);
    }
  }
  std::memset(sums, 0, tiles * kQueries * stride * sizeof(float));
  for (size_t start = 0; start < in.tokens; start += kDenseKeys) {
    const size_t count = std::min(kDenseKeys, in.tokens - start);
    for (size_t j = 0; j < count; ++j) {
      PackRow(in.Keys(batch, head) + (start + j) * row, width, stride, keys + j * stride);
      PackRow(in.Values(batch, head) + (start + j) * row, width, stride, values + j * stride);
    }
    for (size_t t = 0; t < tiles; ++t) {
      Scores<true>(qt + t * width * kQueries, keys, stride, width, count, scores);
      for (size_t j = 0; job.bias != nullptr && j < count; ++j) {
        const V bias = hn::Set(d, job.bias[batch * in.tokens + start + j]);
        for (size_t v = 0; v < kQueries; v += kLanes) {
          hn::Store(hn::Add(hn::Load(d, scores + j * kQueries + v), bias), d, scores + j * kQueries + v);
        }
      }
      float* highest = state + 2 * t * kQueries;
      float* total = highest + kQueries;
      HWY_ALIGN float carry[kQueries];
      for (size_t v = 0; v < kQueries; v += kLanes) {
        const V old = hn::Load(d, highest + v);
        V top = old;
        for (size_t j = 0; j < count; ++j) top = hn::Max(top, hn::Load(d, scores + j * kQueries + v));
        V sum = hn::Zero(d);
        for (size_t j = 0; j < count; ++j) {
          const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
          hn::Store(weight, d, scores + j * kQueries + v);
          sum = hn::Add(sum, weight);
        }
        const V factor = Exp2(hn::Sub(old, top));
        hn::Store(factor, d, carry + v);
        hn::Store(top, d, highest + v);
        hn::Store(hn::MulAdd(hn::Load(d, total + v), factor, sum), d, total + v);
      }
      const Weighted part{scores, values, count, nullptr};
      float* sum = sums + t * kQueries * stride;
      Accumulate<true, true>(&part, 1, stride, sum, carry, nullptr, kQueries, stride, sum, stride);
    }
  }
  for (size_t i = 0; i < queries; ++i) {
    const float* sum = sums + i * stride;
    const float share = 1.0f / state[(2 * (i / kQueries) + 1) * kQueries + i % kQueries];
    float* to = output + i * in.heads * width;
    for (size_t c = 0; c < width; ++c) to[c] = share * sum[c];
  }
}

bool DenseAttentionTarget(const Packed& in, float* output, const Parallel& parallel) {
  const size_t per_group = kDenseTiles * kQueries;
  if (in.batch == 0) return true;
  DenseJob job{in, output, (in.tokens + per_group - 1) / per_group, nullptr};
  DenseWork work;
  if (in.sizes != nullptr) {
    auto* bias = static_cast<float*>(parallel.Shared(Times(Times(in.batch, in.tokens), sizeof(float))));
    if (bias == nullptr) return false;
    LogSizes(in.sizes, in.batch * in.tokens, bias);
    job.bias = bias;
  }
  return parallel.For(in.batch * in.heads * job.groups, LayOut(job, nullptr, &work), DenseGroup, &job);
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

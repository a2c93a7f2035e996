// MatchTokens and MergeTokens (ops/schema.py): pairs of similar tokens, and their means.
//
//   keys [N][H][d] --mean over the heads, normalized--> metric [P][d]
//   even rows x odd rows within the window, sizes --> best partner of each even row --> best suitor of each odd row
//   the odd rows with the most similar suitors --> pairs, in token order
//
// In this file, an even row is a "seeker" and an odd row is "sought". A suitor is a seeker whose best partner is a
// given odd row.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "merge.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

constexpr size_t kRows = 64;           // rows per work item
constexpr float kNoPartner = -3e30f;   // below any similarity
constexpr float kBroken = -1e30f;      // lowest similarity, which also replaces NaN
constexpr int32_t kNobody = -1;

struct MatchJob {
  Packed in;
  MatchSettings settings;
  int32_t* pairs;
  size_t patches, seekers, sought, stride, blocks;
  float* metric;     // [batch][patches][stride]
  float* best;       // [batch][seekers]: similarity to the partner
  int32_t* partner;  // [batch][seekers]
  float* score;      // [batch][sought]: similarity to the accepted suitor
  int32_t* suitor;   // [batch][sought], or kNobody
  int32_t* order;    // [batch][sought]
  int32_t* source;   // [batch][patches]: merged seeker, the patch itself, or kNobody if it is merged away
};

// Computes a block of rows of the metric.
HWY_NOINLINE void MetricRows(void* data, size_t item, void*) {
  const MatchJob& job = *static_cast<const MatchJob*>(data);
  const Packed& in = job.in;
  const D d;
  const size_t block = item % job.blocks, batch = item / job.blocks;
  const V share = hn::Set(d, 1.0f / static_cast<float>(in.heads));
  for (size_t j = block * kRows; j < std::min(job.patches, (block + 1) * kRows); ++j) {
    const float* keys = in.Rows(batch * in.heads, 1) + (job.settings.prefix + j) * in.Row();
    float* row = job.metric + (batch * job.patches + j) * job.stride;
    V squares = hn::Zero(d);
    for (size_t c = 0; c < job.stride; c += kLanes) {
      const size_t some = std::min(kLanes, in.width - c);
      V sum = hn::Zero(d);
      for (size_t h = 0; h < in.heads; ++h) sum = hn::Add(sum, hn::LoadN(d, keys + h * in.width + c, some));
      sum = hn::Mul(sum, share);
      squares = hn::MulAdd(sum, sum, squares);
      hn::Store(sum, d, row + c);
    }
    const V length = hn::Set(d, std::sqrt(hn::ReduceSum(d, squares)));
    for (size_t c = 0; c < job.stride; c += kLanes) {
      // Padding stays 0, even if the length is 0 or NaN.
      const auto real = hn::FirstN(d, std::min(kLanes, in.width - c));
      hn::Store(hn::IfThenElseZero(real, hn::Div(hn::Load(d, row + c), length)), d, row + c);
    }
  }
}

// Finds the best partner of each seeker in a block.
HWY_NOINLINE void Seek(void* data, size_t item, void*) {
  const MatchJob& job = *static_cast<const MatchJob*>(data);
  const D d;
  const size_t block = item % job.blocks, batch = item / job.blocks, half = job.settings.window / 2;
  const float* metric = job.metric + batch * job.patches * job.stride;
  const float* sizes = job.in.sizes + batch * job.in.tokens + job.settings.prefix;
  for (size_t e = block * kRows; e < std::min(job.seekers, (block + 1) * kRows); ++e) {
    const float* a = metric + 2 * e * job.stride;
    float best = kNoPartner;
    int32_t partner = kNobody;
    for (size_t j = e > half ? e - half : 0; j < std::min(job.sought, Plus(e, half)); ++j) {
      const float* b = metric + (2 * j + 1) * job.stride;
      V sum = hn::Zero(d);
      for (size_t c = 0; c < job.stride; c += kLanes) sum = hn::MulAdd(hn::Load(d, a + c), hn::Load(d, b + c), sum);
      const float both = sizes[2 * e] * sizes[2 * j + 1] / (sizes[2 * e] + sizes[2 * j + 1]);
      const float alike = std::sqrt(both) * (hn::ReduceSum(d, sum) - 1.0f);
      const float value = alike > kBroken ? alike : kBroken;  // false for NaN
      if (value > best) {
        best = value;
        partner = static_cast<int32_t>(j);
      }
    }
    job.best[batch * job.seekers + e] = best;
    job.partner[batch * job.seekers + e] = partner;
  }
}

// Assigns suitors to the odd patches of an image and writes its pairs.
HWY_NOINLINE void Pair(void* data, size_t batch, void*) {
  const MatchJob& job = *static_cast<const MatchJob*>(data);
  const size_t merged = job.settings.merged, prefix = job.settings.prefix;
  float* score = job.score + batch * job.sought;
  int32_t *suitor = job.suitor + batch * job.sought, *order = job.order + batch * job.sought;
  int32_t* source = job.source + batch * job.patches;
  for (size_t j = 0; j < job.sought; ++j) {
    score[j] = kNoPartner;
    suitor[j] = kNobody;
    order[j] = static_cast<int32_t>(j);
  }
  for (size_t e = 0; e < job.seekers; ++e) {
    const int32_t j = job.partner[batch * job.seekers + e];
    const float best = job.best[batch * job.seekers + e];
    if (j != kNobody && best > score[j]) {
      score[j] = best;
      suitor[j] = static_cast<int32_t>(e);
    }
  }
  const auto closer = [score](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; };
  std::nth_element(order, order + merged - 1, order + job.sought, closer);
  std::sort(order, order + merged);  // by index: patches without a suitor get one in this order
  for (size_t i = 0; i < job.patches; ++i) source[i] = static_cast<int32_t>(i);
  const auto join = [&](int32_t j, size_t e) {
    source[2 * j + 1] = static_cast<int32_t>(2 * e);
    source[2 * e] = kNobody;
  };
  for (size_t i = 0; i < merged; ++i) {
    if (suitor[order[i]] != kNobody) join(order[i], static_cast<size_t>(suitor[order[i]]));
  }
  size_t free = 0;
  for (size_t i = 0; i < merged; ++i) {
    if (suitor[order[i]] != kNobody) continue;
    while (source[2 * free] == kNobody) ++free;
    join(order[i], free);
  }
  int32_t* pairs = job.pairs + batch * (job.in.tokens - merged) * 2;
  for (size_t i = 0; i < prefix; ++i, pairs += 2) pairs[0] = pairs[1] = static_cast<int32_t>(i);
  for (size_t i = 0; i < job.patches; ++i) {
    if (source[i] == kNobody) continue;
    pairs[0] = static_cast<int32_t>(prefix + i);
    pairs[1] = static_cast<int32_t>(prefix) + source[i];
    pairs += 2;
  }
}

bool MatchTokensTarget(const Packed& in, const MatchSettings& settings, int32_t* pairs, const Call& call) {
  if (in.batch == 0) return true;
  MatchJob job{};
  job.in = in;
  job.settings = settings;
  job.pairs = pairs;
  job.patches = in.tokens - settings.prefix;
  job.seekers = (job.patches + 1) / 2;
  job.sought = job.patches / 2;
  job.stride = PackedWidth(in.width);
  const bool shared = call.Share([&](Layout* layout) {
    job.metric = layout->Take<float>(in.batch, job.patches, job.stride);
    job.best = layout->Take<float>(in.batch, job.seekers);
    job.partner = layout->Take<int32_t>(in.batch, job.seekers);
    job.score = layout->Take<float>(in.batch, job.sought);
    job.suitor = layout->Take<int32_t>(in.batch, job.sought);
    job.order = layout->Take<int32_t>(in.batch, job.sought);
    job.source = layout->Take<int32_t>(in.batch, job.patches);
  });
  if (!shared) return false;
  job.blocks = Groups(job.patches, kRows);
  if (!call.For(in.batch * job.blocks, 0, MetricRows, &job)) return false;
  job.blocks = Groups(job.seekers, kRows);
  return call.For(in.batch * job.blocks, 0, Seek, &job) && call.For(in.batch, 0, Pair, &job);
}

// ---------------------------------------------------------------------------------------------------------------------

struct MergeJob {
  Merging in;
  float* output;
  size_t blocks;
};

// Merges a block of pairs.
HWY_NOINLINE void MergeRows(void* data, size_t item, void*) {
  const MergeJob& job = *static_cast<const MergeJob*>(data);
  const Merging& in = job.in;
  const D d;
  const size_t block = item % job.blocks, batch = item / job.blocks;
  const float* sizes = in.sizes + batch * in.tokens;
  for (size_t i = block * kRows; i < std::min(in.count, (block + 1) * kRows); ++i) {
    const int32_t* pair = in.pairs + (batch * in.count + i) * 2;
    const size_t a = std::min<size_t>(static_cast<uint32_t>(pair[0]), in.tokens - 1);
    const size_t b = std::min<size_t>(static_cast<uint32_t>(pair[1]), in.tokens - 1);
    const float* x = in.x + (batch * in.tokens + a) * in.channels;
    const float* y = in.x + (batch * in.tokens + b) * in.channels;
    float* output = job.output + (batch * in.count + i) * in.channels;
    if (a == b) {
      std::memcpy(output, x, in.channels * sizeof(float));
      continue;
    }
    const float share = sizes[a] / (sizes[a] + sizes[b]);
    const V first = hn::Set(d, share), second = hn::Set(d, 1.0f - share);
    for (size_t c = 0; c < in.channels; c += kLanes) {
      const size_t some = std::min(kLanes, in.channels - c);
      const V sum = hn::MulAdd(first, hn::LoadN(d, x + c, some), hn::Mul(second, hn::LoadN(d, y + c, some)));
      hn::StoreN(sum, d, output + c, some);
    }
  }
}

bool MergeTokensTarget(const Merging& in, float* output, const Call& call) {
  MergeJob job{in, output, Groups(in.count, kRows)};
  return call.For(in.batch * job.blocks, 0, MergeRows, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool MatchTokens(const Packed& in, const MatchSettings& settings, int32_t* pairs, const Call& call) {
  return SPARSIFINER_BUILT(MatchTokensTarget)(in, settings, pairs, call);
}

bool MergeTokens(const Merging& in, float* output, const Call& call) {
  return SPARSIFINER_BUILT(MergeTokensTarget)(in, output, call);
}

}  // namespace sparsifiner
#endif

#include "stream.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace {

// Added to the change of every patch, so that patches that did not change are ranked by age.
constexpr double kStill = 1e-3;
// One in this many recomputed patches is taken from the oldest ones, regardless of its change.
constexpr int64_t kOldest = 4;

// A patch counts as changed if its change exceeds kNoise times the median over the frame, an estimate of the camera's
// noise. The threshold is limited to [kLeast, kMost].
constexpr float kNoise = 3.0f, kLeast = 0.25f, kMost = 0.5f;

// Returns the change above which a patch counts as changed.
float changed_from(std::vector<float> change) {
  const size_t half = change.size() / 2;
  std::nth_element(change.begin(), change.begin() + half, change.end());
  float median = change[half];
  if (change.size() % 2 == 0) median = (median + *std::max_element(change.begin(), change.begin() + half)) / 2;
  return std::min(std::max(kNoise * median, kLeast), kMost);
}

size_t bytes_of(ONNXTensorElementDataType type) { return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 4; }

}  // namespace

Stream::Stream(Model& embedding, Model& step, double share) : embedding_(embedding), step_(step), share_(share) {
  const auto& shape = embedding.outputs.at("stream.tokens").shape;  // [1, tokens, width]: prefix tokens, then patches.
  tokens_ = shape.at(1);
  width_ = shape.at(2);
  patches_ = embedding.outputs.at("stream.change").shape.at(1);
  references_.resize(patches_ * width_);
  ages_.resize(patches_);
  for (const auto& [name, spec] : step.inputs) {
    const bool cached = name.rfind("cache.", 0) == 0;
    if (!cached && name.rfind("read.", 0) != 0) continue;
    Kept& kept = kept_[name];
    kept.cached = cached;
    kept.row = spec.shape.at(2) * bytes_of(spec.type);
    kept.skipped = cached ? kept.row / 2 : 0;
    kept.data.resize(tokens_ * kept.row);
    kept.shape = {1, tokens_, spec.shape[2]};
    kept.type = spec.type;
  }
}

Outputs Stream::next(const View& image) {
  auto embedded = embedding_.run({{"image", image}, {"stream.references", view(references_, {1, patches_, width_})}});
  const float* tokens = embedded.at("stream.tokens").GetTensorData<float>();
  for (int64_t& age : ages_) ++age;
  std::vector<int64_t> all(patches_);
  std::iota(all.begin(), all.end(), 0);
  const float* first = embedded.at("stream.change").GetTensorData<float>();
  std::vector<float> change(first, first + patches_);
  for (float& x : change) x = std::isfinite(x) ? x : 1.0f;
  const bool full = !begun_ || share_ >= 1;
  begun_ = true;
  return step(image, tokens, full ? all : choose(change), full ? std::vector<float>() : change);
}

std::vector<int64_t> Stream::choose(const std::vector<float>& change) const {
  const int64_t count = std::max<int64_t>(1, std::lrint(share_ * patches_));
  std::vector<int64_t> order(patches_);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ages_[a] > ages_[b]; });
  std::vector<double> score(patches_);
  for (int64_t p = 0; p < patches_; ++p) score[p] = (static_cast<float>(kStill) + change[p]) * std::sqrt(ages_[p] + 1.0);
  for (int64_t i = 0; i < std::max<int64_t>(count / kOldest, count > 1); ++i) score[order[i]] = INFINITY;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score[a] > score[b]; });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

Outputs Stream::step(const View& image, const float* tokens, const std::vector<int64_t>& patches, const std::vector<float>& change) {
  const bool full = change.empty();
  const int64_t prefix = tokens_ - patches_, chosen = prefix + static_cast<int64_t>(patches.size());
  std::vector<int64_t> rows(chosen), places(tokens_);
  std::iota(rows.begin(), rows.begin() + prefix, 0);
  std::transform(patches.begin(), patches.end(), rows.begin() + prefix, [&](int64_t p) { return prefix + p; });
  // Attention reads the kept tokens, except those that are recomputed (their count is 0), and the recomputed tokens.
  // `places` is the row of each token in the concatenation of both.
  std::vector<float> counts(tokens_, 1.0f), now(chosen * width_), unchanged(chosen, 0.0f);
  std::iota(places.begin(), places.end(), 0);
  for (int64_t i = 0; i < chosen; ++i) {
    counts[rows[i]] = 0.0f;
    places[rows[i]] = tokens_ + i;
    std::copy_n(tokens + rows[i] * width_, width_, now.begin() + i * width_);
  }
  if (full) counts.resize(1);
  // Recomputed patches that did not change themselves show how similar patches drift that are not recomputed.
  const float limit = full ? 0.0f : changed_from(change);
  for (int64_t i = prefix; i < chosen && !full; ++i) unchanged[i] = change[patches[i - prefix]] > limit ? 0.0f : 1.0f;
  Inputs inputs = {
      {"image", image},
      {"stream.tokens", view(now, {1, chosen, width_})},
      {"stream.rows", view(rows, {chosen})},
      {"stream.counts", view(counts, {1, static_cast<int64_t>(counts.size())})},
      {"stream.places", view(places, {tokens_})},
      {"stream.unchanged", view(unchanged, {1, chosen})},
  };
  for (auto& [name, kept] : kept_) {
    View from = {kept.data.data(), kept.data.size(), kept.shape, kept.type};
    // A full frame reads one cached token, whose count is 0.
    if (full && kept.cached) from.bytes = kept.row, from.shape[1] = 1;
    inputs.emplace(name, from);
  }
  Outputs outputs = step_.run(inputs);
  const float* final = outputs.at("stream.final").GetTensorData<float>();
  if (!full && !std::all_of(final, final + chosen * width_, [](float x) { return std::isfinite(x); })) {
    // Values that are not finite would be kept and read by all later frames. Compute the full frame without the kept
    // state instead.
    std::vector<int64_t> all(patches_);
    std::iota(all.begin(), all.end(), 0);
    return step(image, tokens, all, {});
  }
  for (auto& [name, kept] : kept_) {
    const char* fresh = static_cast<const char*>(outputs.at("new." + name).GetTensorRawData());
    if (!kept.cached) {
      std::memcpy(kept.data.data(), fresh, kept.data.size());
    } else {
      for (int64_t i = 0; i < chosen; ++i) {
        std::memcpy(kept.data.data() + rows[i] * kept.row, fresh + i * (kept.skipped + kept.row) + kept.skipped, kept.row);
      }
    }
    outputs.erase("new." + name);
  }
  outputs.erase("stream.final");
  for (const int64_t p : patches) {
    std::copy_n(tokens + (prefix + p) * width_, width_, references_.begin() + p * width_);
    ages_[p] = 0;
  }
  return outputs;
}

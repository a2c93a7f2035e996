// DenseAttention and CachedAttention (ops/schema.py) in any kind of arithmetic (kernels-inl.h).
//
// Tiles of 16 queries share chunks of packed keys and values. Softmax is updated from chunk to chunk (online softmax),
// so the largest score matrix is that of one tile and one chunk.

#if defined(SPARSIFINER_DENSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_DENSE_INL_H_
#undef SPARSIFINER_DENSE_INL_H_
#else
#define SPARSIFINER_DENSE_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

constexpr size_t kGroupTiles = 16;  // approximate number of query tiles that share a chunk of packed keys
constexpr size_t kGroupKeys = 64;   // keys in a chunk

struct GroupJob {
  Packed in;
  Cache cache;
  Output output;
  const float* bias;        // [batch][tokens]: log2 of sizes, or null
  const float* cache_bias;  // [batch][cache.tokens]: log2 of counts
  size_t groups;            // groups of tiles in a head
  size_t tiles;             // tiles in a group; the last group may have fewer
};

// Working memory for one group.
template <class Word>
struct GroupWork {
  float *turned, *scores, *sums, *highest, *totals, *wide;
  Word *qt, *keys, *values, *weights;
};

template <class Kind, class Word = typename Kind::Word>
HWY_INLINE size_t LayOut(const GroupJob& job, void* base, GroupWork<Word>* work) {
  const size_t words = Kind::RowWords(job.in.width), stride = Kind::Stride(job.in.width);
  Layout layout(base);
  work->turned = layout.Take<float>(job.in.width, kQueries);
  work->wide = layout.Take<float>(job.cache.halves ? 3 : 0, stride);
  work->scores = layout.Take<float>(kGroupKeys + kPaddedRows, kQueries);
  work->sums = layout.Take<float>(job.tiles, kQueries, stride);
  work->highest = layout.Take<float>(job.tiles, kQueries);
  work->totals = layout.Take<float>(job.tiles, kQueries);
  work->qt = layout.Take<Word>(job.tiles, words, kQueries);
  work->keys = layout.Take<Word>(kGroupKeys + kPaddedRows, words);
  work->values = layout.Take<Word>(kGroupKeys, stride);
  work->weights = Kind::TakeWeights(&layout, kGroupKeys, work->scores);
  return layout.used();
}

// Returns a row as float32. A float16 row is converted into `wide`.
HWY_INLINE const float* Widen(const float* row, size_t /*width*/, float* /*wide*/) { return row; }
HWY_INLINE const float* Widen(const hwy::float16_t* row, size_t width, float* HWY_RESTRICT wide) {
#if HWY_TARGET == HWY_SSE2  // SSE2 conversions of vectors do not handle infinity and NaN.
  for (size_t c = 0; c < width; ++c) wide[c] = hwy::F32FromF16(row[c]);
#else
  const D d;
  const hn::Rebind<hwy::float16_t, D> halves;
  size_t c = 0;
  for (; c + kLanes <= width; c += kLanes) hn::Store(hn::PromoteTo(d, hn::LoadU(halves, row + c)), d, wide + c);
  if (c < width) hn::Store(hn::PromoteTo(d, hn::LoadN(halves, row + c, width - c)), d, wide + c);
#endif
  return wide;
}

// Packs `count` keys and values, which are `row` elements apart. If values are packed in pairs and their number is odd,
// the last one fills the missing row, whose weight is 0.
template <class Kind, class Element>
HWY_INLINE void PackChunk(const Element* keys, const Element* values, size_t row, size_t width, size_t count,
                          const GroupWork<typename Kind::Word>& work) {
  const size_t words = Kind::RowWords(width), stride = Kind::Stride(width);
  for (size_t j = 0; j < count; ++j) {
    const size_t ahead = std::min(j + kRowsAhead, count - 1) * row;
    FetchRow(keys + ahead, width);
    FetchRow(values + ahead, width);
    Kind::PackRow(Widen(keys + j * row, width, work.wide), width, work.keys + j * words);
    if ((j + 1) % Kind::kRows != 0 && j + 1 < count) continue;
    const size_t first = j / Kind::kRows * Kind::kRows;
    Kind::PackValues(Widen(values + first * row, width, work.wide + stride),
                     Widen(values + j * row, width, work.wide + 2 * stride), width,
                     work.values + j / Kind::kRows * stride);
  }
}

// Updates the softmax with a chunk: converts its logits to weights, and sets `carry` to the factor of the sums so far.
// biases: log2 of the size of each key, or null.
template <class Kind>
HWY_INLINE void WeighChunk(const float* biases, size_t count, const GroupWork<typename Kind::Word>& work,
                           float* HWY_RESTRICT highest, float* HWY_RESTRICT totals, float* HWY_RESTRICT carry) {
  const D d;
  float* HWY_RESTRICT scores = work.scores;
  for (size_t v = 0; v < kQueries; v += kLanes) {
    const V old = hn::Load(d, highest + v);
    V top = old;
    for (size_t j = 0; j < count; ++j) {
      float* score = scores + j * kQueries + v;
      if (biases != nullptr) hn::Store(hn::Add(hn::Load(d, score), hn::Set(d, biases[j])), d, score);
      top = hn::Max(top, hn::Load(d, score));
    }
    V even = hn::Zero(d), odd = hn::Zero(d);
    const auto weight = [&](size_t j) { return Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top)); };
    size_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const V a = weight(j), b = weight(j + 1);
      even = hn::Add(even, a);
      odd = hn::Add(odd, b);
      Kind::KeepWeights(a, b, j, v, work.weights);
    }
    if (j < count) {
      const V a = weight(j);
      even = hn::Add(even, a);
      Kind::KeepWeights(a, hn::Zero(d), j, v, work.weights);
    }
    const V factor = Exp2(hn::Sub(old, top));
    hn::Store(factor, d, carry + v);
    hn::Store(top, d, highest + v);
    hn::Store(hn::MulAdd(hn::Load(d, totals + v), factor, hn::Add(even, odd)), d, totals + v);
  }
}

template <class Kind>
HWY_NOINLINE void GroupItem(void* data, size_t item, void* base) {
  const GroupJob& job = *static_cast<const GroupJob*>(data);
  const Packed& in = job.in;
  const size_t group = item % job.groups, head = item / job.groups, batch = head / in.heads;
  const size_t begin = group * job.tiles * kQueries, end = std::min(begin + job.tiles * kQueries, in.tokens);
  const size_t words = Kind::RowWords(in.width), stride = Kind::Stride(in.width);
  const float* queries = in.Rows(head, 0);
  const size_t channels = in.heads * in.width, first = batch * job.cache.tokens;
  GroupWork<typename Kind::Word> work;
  LayOut<Kind>(job, base, &work);
  [[maybe_unused]] const typename Kind::Session session;
  std::memset(work.sums, 0, job.tiles * kQueries * stride * sizeof(float));
  std::memset(work.totals, 0, job.tiles * kQueries * sizeof(float));
  std::fill(work.highest, work.highest + job.tiles * kQueries, kLowest);
  for (size_t q = begin; q < end; q += kQueries) {
    const float* rows[kQueries];
    QueryRows(queries + q * in.Row(), in.Row(), std::min(kQueries, end - q), rows);
    for (size_t i = 0; i < kQueries; ++i) FetchRow(rows[i] + (q + kQueries < end ? kQueries * in.Row() : 0), in.width);
    Kind::PackQueries(rows, in.width, in.scale * kLog2e, work.turned, work.qt + (q - begin) * words);
  }
  const auto attend = [&](const auto* keys, const auto* values, size_t row, const float* biases, size_t tokens) {
    for (size_t start = 0; start < tokens; start += kGroupKeys) {
      const size_t count = std::min(kGroupKeys, tokens - start);
      PackChunk<Kind>(keys + start * row, values + start * row, row, in.width, count, work);
      for (size_t q = begin; q < end; q += kQueries) {
        float *sums = work.sums + (q - begin) * stride, *state = work.highest + (q - begin);
        Kind::Scores(work.qt + (q - begin) * words, work.keys, in.width, count, work.scores);
        HWY_ALIGN float carry[kQueries];
        WeighChunk<Kind>(biases == nullptr ? nullptr : biases + start, count, work, state, work.totals + (q - begin),
                         carry);
        Kind::AddSums(work.weights, work.values, Groups(count, Kind::kRows), stride, carry, sums);
      }
    }
  };
  const auto attend_cached = [&](const auto* all) {
    const auto* keys = all + first * 2 * channels + head % in.heads * in.width;
    attend(keys, keys + channels, 2 * channels, job.cache_bias + first, job.cache.tokens);
  };
  // The image's own tokens come first: every count in the cache's first chunk may be 0, and the softmax must start with
  // at least one finite logit.
  attend(in.Rows(head, 1), in.Rows(head, 2), in.Row(), job.bias == nullptr ? nullptr : job.bias + batch * in.tokens,
         in.tokens);
  if (job.cache.halves) {
    attend_cached(static_cast<const hwy::float16_t*>(job.cache.rows));
  } else if (job.cache.tokens != 0) {
    attend_cached(static_cast<const float*>(job.cache.rows));
  }
  for (size_t q = begin; q < end; ++q) {
    const float share = 1.0f / work.totals[q - begin];
    const Output to = job.output.From(((batch * in.tokens + q) * in.heads + head % in.heads) * in.width);
    for (size_t c = 0; c < in.width; c += kLanes) {
      Put(hn::Mul(hn::Set(D(), share), hn::Load(D(), work.sums + (q - begin) * stride + c)), in.width - c, to.From(c));
    }
  }
}

template <class Kind>
bool AttendDensely(const Packed& in, const Cache& cache, const Output& output, const Call& call) {
  if (in.batch == 0) return true;
  GroupJob job{in, cache, output, nullptr, nullptr, 0, 0};
  // Groups of a head have about the same size, because each of them packs all keys, even a small one.
  const size_t tiles = Groups(in.tokens, kQueries);
  const size_t least = std::max<size_t>(1, (tiles + kGroupTiles / 2) / kGroupTiles);
  job.tiles = Groups(tiles, least);
  job.groups = Groups(tiles, job.tiles);
  if (in.sizes != nullptr || cache.tokens != 0) {
    float *bias = nullptr, *cache_bias = nullptr;
    const auto take = [&](Layout* layout) {
      bias = layout->Take<float>(in.sizes == nullptr ? 0 : in.batch, in.tokens);
      cache_bias = layout->Take<float>(in.batch, cache.tokens);
    };
    if (!call.Share(take)) return false;
    if (in.sizes != nullptr) LogSizes(in.sizes, in.batch * in.tokens, bias);
    LogSizes(cache.counts, in.batch * cache.tokens, cache_bias);
    job.bias = in.sizes == nullptr ? nullptr : bias;
    job.cache_bias = cache_bias;
  }
  GroupWork<typename Kind::Word> work;
  return call.For(in.batch * in.heads * job.groups, LayOut<Kind>(job, nullptr, &work), GroupItem<Kind>, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

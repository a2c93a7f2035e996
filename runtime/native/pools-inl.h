// Softmax of SparseAttention over listed keys and background tokens. Compiled once per instruction set.
//
// A pool of `key_pool` consecutive patches has one background token. It represents the patches of the pool that a tile
// did not list (the "rest" of the pool). Its logit and its value are derived from the means over the whole pool, from
// which the listed keys are subtracted.

#if defined(SPARSIFINER_POOLS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_POOLS_INL_H_
#undef SPARSIFINER_POOLS_INL_H_
#else
#define SPARSIFINER_POOLS_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// Key list of a tile: the prefix tokens, followed by the listed patches, clamped to the valid range.
struct List {
  const int32_t* patches;
  size_t prefix, count, limit;

  // Returns the token at position j.
  HWY_INLINE size_t At(size_t j) const {
    if (j < prefix) return j;
    return prefix + std::min(static_cast<size_t>(static_cast<uint32_t>(patches[j - prefix])), limit - 1);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One query and many keys, lanes are channels. Used for prefix tokens, and if each query has its own list.

// Computes the attention of one query. list: tokens to attend to, or null for all of [0, count). bias: log2 of the
// sizes of the tokens, or null. weights: scratch [count]. Writes `width` elements of the output.
inline HWY_NOINLINE void AttendOne(const float* HWY_RESTRICT query, const float* HWY_RESTRICT keys, const float* values,
                                   size_t row, const List* list, size_t count, float scale, size_t width,
                                   const float* HWY_RESTRICT bias, float* HWY_RESTRICT weights,
                                   const Output& output) {
  const D d;
  const auto at = [&](size_t j) -> size_t { return list == nullptr ? j : list->At(j); };
  const size_t whole = width / kLanes * kLanes;
  float highest = kLowest;
  for (size_t j = 0; j < count; ++j) {
    const float* key = keys + at(j) * row;
    FetchRow(keys + at(std::min(j + kRowsAhead, count - 1)) * row, width);
    V sum = hn::Zero(d);
    for (size_t c = 0; c < whole; c += kLanes) sum = hn::MulAdd(hn::LoadU(d, query + c), hn::LoadU(d, key + c), sum);
    if (whole < width) {
      sum = hn::MulAdd(hn::LoadN(d, query + whole, width - whole), hn::LoadN(d, key + whole, width - whole), sum);
    }
    weights[j] = scale * kLog2e * hn::ReduceSum(d, sum) + (bias == nullptr ? 0.0f : bias[at(j)]);
    highest = std::max(highest, weights[j]);
  }
  V total = hn::Zero(d);
  for (size_t j = 0; j < count; j += kLanes) {
    const size_t some = std::min(kLanes, count - j);
    const V shifted = hn::Sub(hn::LoadN(d, weights + j, some), hn::Set(d, highest));
    const V weight = hn::IfThenElseZero(hn::FirstN(d, some), Exp2(shifted));
    total = hn::Add(total, weight);
    hn::StoreN(weight, d, weights + j, some);
  }
  const V share = hn::Set(d, 1.0f / hn::ReduceSum(d, total));
  for (size_t c = 0; c < width; c += kLanes) {
    const size_t some = std::min(kLanes, width - c);
    V even = hn::Zero(d), odd = hn::Zero(d);
    size_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const float *x = values + at(j) * row + c, *y = values + at(j + 1) * row + c;
      if (c == 0) FetchRow(values + at(std::min(j + kRowsAhead, count - 1)) * row, width);
      if (c == 0) FetchRow(values + at(std::min(j + kRowsAhead + 1, count - 1)) * row, width);
      even = hn::MulAdd(hn::Set(d, weights[j]), LoadSome(x, some), even);
      odd = hn::MulAdd(hn::Set(d, weights[j + 1]), LoadSome(y, some), odd);
    }
    if (j < count) even = hn::MulAdd(hn::Set(d, weights[j]), LoadSome(values + at(j) * row + c, some), even);
    Put(hn::Mul(share, hn::Add(even, odd)), some, output.From(c));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: 16 queries that share a list.

struct SparseJob {
  Packed in;
  SparseSettings settings;
  const int32_t* indices;
  Output output;
  size_t patches, tiles, pools;
  size_t run;          // patches packed by one work item: a pool if there are pools
  size_t runs;         // number of such runs
  size_t row;          // distance between rows in words
  float* logs;         // [key_pool + 1]: log2(n); -inf for n = 0
  uint16_t* pool_of;   // [patches]: pool of each patch
  float* bias;         // [batch][tokens]: log2 of sizes; null if all sizes are 1
  float* pool_sizes;   // [batch][pools]: sum of the sizes in a pool; null if all sizes are 1
};

// Fills in the fields that follow from dimensions and settings.
HWY_INLINE SparseJob Describe(const Packed& in, const int32_t* indices, const SparseSettings& settings,
                              const Output& output) {
  SparseJob job{};
  job.in = in;
  job.settings = settings;
  job.indices = indices;
  job.output = output;
  job.patches = in.tokens - settings.prefix;
  job.settings.key_pool = std::min(settings.key_pool, job.patches);
  job.tiles = Groups(job.patches, settings.tile);
  job.pools = settings.key_pool ? Groups(job.patches, job.settings.key_pool) : 0;
  job.run = job.pools ? job.settings.key_pool : std::min<size_t>(64, job.patches);
  job.runs = Groups(job.patches, job.run);
  return job;
}

// Allocates the tables that all tiles share.
HWY_INLINE void TakeTables(Layout* layout, SparseJob* job) {
  job->logs = layout->Take<float>(job->settings.key_pool + 1);
  job->pool_of = layout->Take<uint16_t>(job->patches);
  job->bias = job->in.sizes == nullptr ? nullptr : layout->Take<float>(job->in.batch, job->in.tokens);
  job->pool_sizes = job->in.sizes == nullptr ? nullptr : layout->Take<float>(job->in.batch, job->pools);
}

// Fills the tables that all tiles share.
HWY_INLINE void FillTables(const SparseJob& job) {
  const Packed& in = job.in;
  if (job.pools != 0) {
    job.logs[0] = kLowest;
    for (size_t n = 1; n <= job.settings.key_pool; ++n) job.logs[n] = std::log2(static_cast<float>(n));
    for (size_t j = 0; j < job.patches; ++j) job.pool_of[j] = static_cast<uint16_t>(j / job.settings.key_pool);
  }
  if (in.sizes == nullptr) return;
  LogSizes(in.sizes, in.batch * in.tokens, job.bias);
  std::memset(job.pool_sizes, 0, in.batch * job.pools * sizeof(float));
  for (size_t i = 0; job.pools != 0 && i < in.batch * job.patches; ++i) {
    const size_t batch = i / job.patches, j = i % job.patches;
    job.pool_sizes[batch * job.pools + job.pool_of[j]] += in.sizes[batch * in.tokens + job.settings.prefix + j];
  }
}

// Sizes of each pool and of its rest, for the list of one tile. Without merged tokens, sizes are numbers of patches.
struct Rest {
  float *whole, *listed;   // [pools]: size of all patches, and of the listed ones
  float *rest, *log_rest;  // [pools]: size of the others and its log2; rest is 0 if all are listed
  float* sizes;            // [K]: sizes of the listed keys; null if all sizes are 1
};

// Computes the logits of the background tokens. selected: [count][16], logits of the listed keys. pools: [pools][16],
// on entry the logits of the mean keys of whole pools; on exit the logits of the mean keys of the rests, plus log2 of
// the sizes of the rests. sums: scratch [pools][16].
template <bool kSized>
HWY_INLINE void RestOfPools(const SparseJob& job, const uint16_t* owner, size_t count, const float* selected,
                            const Rest& counts, float* HWY_RESTRICT sums, float* HWY_RESTRICT pools) {
  const D d;
  std::memset(sums, 0, job.pools * kQueries * sizeof(float));
  for (size_t v = 0; v < kQueries; v += kLanes) {
    const auto logit = [&](size_t j) {
      const V x = hn::Load(d, selected + j * kQueries + v);
      return kSized ? hn::Mul(hn::Set(d, counts.sizes[j]), x) : x;
    };
    // Lists are ascending, so the keys of a pool are consecutive. Any other order gives the same result, but slower.
    for (size_t j = 0; j < count;) {
      const size_t pool = owner[j];
      V sum = logit(j);
      for (++j; j < count && owner[j] == pool; ++j) sum = hn::Add(sum, logit(j));
      hn::Store(hn::Add(sum, hn::Load(d, sums + pool * kQueries + v)), d, sums + pool * kQueries + v);
    }
    for (size_t r = 0; r < job.pools; ++r) {
      const V whole = hn::Load(d, pools + r * kQueries + v);
      const V taken = hn::NegMulAdd(hn::Set(d, counts.listed[r]), whole, hn::Load(d, sums + r * kQueries + v));
      const V share = hn::Set(d, counts.rest[r] > 0 ? -1.0f / counts.rest[r] : 0.0f);
      hn::Store(hn::Add(hn::MulAdd(taken, share, whole), hn::Set(d, counts.log_rest[r])), d, pools + r * kQueries + v);
    }
  }
}

// scores[j][16] += bias of the token at places[j]. Tokens are `row` floats apart.
HWY_INLINE void AddBias(const float* bias, const uint32_t* places, uint32_t row, size_t count,
                        float* HWY_RESTRICT scores) {
  const D d;
  for (size_t j = 0; j < count; ++j) {
    const V more = hn::Set(d, bias[places[j] / row]);
    for (size_t v = 0; v < kQueries; v += kLanes) {
      hn::Store(hn::Add(hn::Load(d, scores + j * kQueries + v), more), d, scores + j * kQueries + v);
    }
  }
}

// Computes the softmax of a tile over listed keys and background tokens. scores [count][16] and pools [pools][16] are
// logits on entry and weights on exit. shares [16]: factors that normalize the weights. sums: scratch [pools][16].
template <bool kSized>
HWY_NOINLINE void WeighTile(const SparseJob& job, size_t count, const uint16_t* owner, const Rest& counts,
                            float* HWY_RESTRICT scores, float* HWY_RESTRICT pools, float* HWY_RESTRICT sums,
                            float* HWY_RESTRICT shares) {
  const SparseSettings& s = job.settings;
  const D d;
  const size_t rows = count + job.pools;
  for (size_t v = 0; v < kQueries; v += kLanes) {
    V top = hn::Load(d, scores + v);
    for (size_t j = 1; j < rows; ++j) top = hn::Max(top, hn::Load(d, scores + j * kQueries + v));
    V total = hn::Zero(d);
    for (size_t r = 0; r < job.pools; ++r) {
      const float rest = counts.rest[r];
      const V weight = Exp2(hn::Sub(hn::Load(d, pools + r * kQueries + v), top));
      total = hn::Add(total, rest > 0 ? weight : hn::Zero(d));
      // `share` is the weight of one patch of the rest. The weight of the pool's mean value covers all patches of the
      // pool, so `weigh` subtracts the share from the listed ones.
      const V share = hn::Mul(weight, hn::Set(d, rest > 0 ? 1.0f / rest : 0.0f));
      hn::Store(share, d, sums + r * kQueries + v);
      hn::Store(hn::Mul(share, hn::Set(d, counts.whole[r])), d, pools + r * kQueries + v);
    }
    for (size_t j = 0; j < s.prefix_keys; ++j) {
      const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
      total = hn::Add(total, weight);
      hn::Store(weight, d, scores + j * kQueries + v);
    }
    V other = hn::Zero(d);
    const auto weigh = [&](size_t j, V* sum) {
      const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
      *sum = hn::Add(*sum, weight);
      const size_t key = j - s.prefix_keys;
      const V back = job.pools ? hn::Load(d, sums + owner[key] * kQueries + v) : hn::Zero(d);
      const V net = kSized && job.pools ? hn::NegMulAdd(hn::Set(d, counts.sizes[key]), back, weight)
                                        : hn::Sub(weight, back);
      hn::Store(net, d, scores + j * kQueries + v);
    };
    size_t j = s.prefix_keys;
    for (; j + 2 <= count; j += 2) {
      weigh(j, &total);
      weigh(j + 1, &other);
    }
    if (j < count) weigh(j, &other);
    total = hn::Add(total, other);
    hn::Store(hn::Div(hn::Set(d, 1.0f), total), d, shares + v);
  }
}

// Computes the pool of each listed key (owner) and the number of listed keys in each pool. number: [4][pools], of which
// the first row is the result. Four counters per pool avoid waiting for the previous increment of the same counter.
HWY_INLINE void CountListed(const SparseJob& job, const List& list, size_t count, uint16_t* HWY_RESTRICT owner,
                            uint32_t* HWY_RESTRICT number) {
  const uint32_t most = static_cast<uint32_t>(list.limit - 1);
  std::memset(number, 0, 4 * job.pools * sizeof(uint32_t));
  for (size_t j = 0; j < count; ++j) {
    owner[j] = job.pool_of[std::min(static_cast<uint32_t>(list.patches[j]), most)];
    ++number[j % 4 * job.pools + owner[j]];
  }
  for (size_t r = 0; r < job.pools; ++r) {
    number[r] += number[job.pools + r] + number[2 * job.pools + r] + number[3 * job.pools + r];
  }
}

// Number of entries after the last place, for blocks that prefetch ahead.
constexpr size_t kPlacesAhead = 32;

// Working memory for the list, the scores and the pools of a tile.
struct ListWork {
  float *scores, *sums;
  uint16_t* owner;
  uint32_t *number, *places;
  Rest counts;
};

// Allocates the working memory of a tile.
HWY_INLINE void TakeList(const SparseJob& job, Layout* layout, ListWork* work) {
  const size_t count = job.settings.prefix_keys + job.settings.keys;
  work->scores = layout->Take<float>(std::max((count + job.pools + kPaddedRows) * kQueries, job.in.tokens));
  work->sums = layout->Take<float>(job.pools, kQueries);
  work->owner = layout->Take<uint16_t>(job.settings.keys);
  work->places = layout->Take<uint32_t>(count + job.pools + kPlacesAhead);
  work->number = layout->Take<uint32_t>(4 * job.pools);
  work->counts.whole = layout->Take<float>(job.pools);
  work->counts.listed = layout->Take<float>(job.pools);
  work->counts.rest = layout->Take<float>(job.pools);
  work->counts.log_rest = layout->Take<float>(job.pools);
  work->counts.sizes = job.bias == nullptr ? nullptr : layout->Take<float>(job.settings.keys);
}

// Computes the size of the rest of each pool, after CountListed.
HWY_INLINE void CountRest(const SparseJob& job, size_t batch, const List& list, const ListWork& work) {
  const Rest& counts = work.counts;
  for (size_t r = 0; r < job.pools; ++r) {
    const size_t size = std::min(job.settings.key_pool, job.patches - r * job.settings.key_pool);
    const size_t listed = std::min<size_t>(work.number[r], size);
    counts.whole[r] = static_cast<float>(size);
    counts.listed[r] = static_cast<float>(listed);
    counts.rest[r] = static_cast<float>(size - listed);
    counts.log_rest[r] = job.logs[size - listed];
  }
  if (job.bias == nullptr) return;
  const float* sizes = job.in.sizes + batch * job.in.tokens + list.prefix;
  std::memset(counts.listed, 0, job.pools * sizeof(float));
  for (size_t j = 0; j < job.settings.keys; ++j) {
    counts.sizes[j] = sizes[std::min<size_t>(static_cast<uint32_t>(list.patches[j]), list.limit - 1)];
    if (job.pools != 0) counts.listed[work.owner[j]] += counts.sizes[j];
  }
  for (size_t r = 0; r < job.pools; ++r) {
    counts.whole[r] = job.pool_sizes[batch * job.pools + r];
    if (counts.rest[r] > 0) {
      counts.rest[r] = counts.whole[r] - counts.listed[r];
      counts.log_rest[r] = std::log2(counts.rest[r]);
    }
  }
}

// Computes the offsets of the rows of a list, followed by those of `pools` background tokens, which come after all
// tokens, in words from the first token's row. Also counts the listed keys of each pool.
HWY_INLINE void PlaceList(const SparseJob& job, size_t batch, const List& list, size_t pools, const ListWork& work) {
  const uint32_t first = static_cast<uint32_t>(list.prefix), most = static_cast<uint32_t>(list.limit - 1);
  const uint32_t step = static_cast<uint32_t>(job.row);
  for (uint32_t j = 0; j < first; ++j) work.places[j] = j * step;
  for (size_t j = 0; j < job.settings.keys; ++j) {
    work.places[first + j] = (first + std::min(static_cast<uint32_t>(list.patches[j]), most)) * step;
  }
  for (size_t r = 0; r < pools; ++r) work.places[list.count + r] = static_cast<uint32_t>(job.in.tokens + r) * step;
  const size_t rows = list.count + pools;
  std::fill(work.places + rows, work.places + rows + kPlacesAhead, work.places[list.count - 1]);
  if (job.pools != 0) CountListed(job, list, job.settings.keys, work.owner, work.number);
  CountRest(job, batch, list, work);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

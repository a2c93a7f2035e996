// KeySelect (ops/schema.py): low-rank scores of all keys for the pooled queries, then the K best keys of each tile.
//
//   keys [P][d] --Transpose16, proj_k--> projected_k [P/16][c][16]       lanes are keys
//   pooled queries [G][d] (means of queries) --proj_q--> projected_q [G][c]
//   projected_q x projected_k --> logits [16 pooled queries][P]
//   logits --log-softmax, maximum over the pooled queries of a tile, plus bonus--> scores [P]
//   scores --BestKeys--> indices, ascending. The K-th score is found by narrowing a bracket, without sorting.
//
// The bonus of a key is value_power times the log of its value deviation.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "select.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "best-keys-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

constexpr float kDeviationFloor = 1e-6f;  // lower bound of the value deviation; see DEVIATION_FLOOR in ops/schema.py

struct SelectJob {
  Packed in;
  SelectSettings settings;
  int32_t* indices;
  size_t patches, padded, pooled_queries, tiles, stride;
  size_t pool_run;      // keys whose bonus is computed together: a pool if there are pools
  size_t runs;          // number of such runs
  size_t lane_blocks;   // blocks of 16 channels of proj_q
  size_t projected_q_stride;
  size_t rows;          // rows of logits
  float* proj_k;        // [heads][c][stride]: transposed
  float* proj_q;        // [heads][lane_blocks][d][16], with scale and log2(e)
  float* projected_k;   // [batch * heads][padded / 16][c][16]
  float* bonus;         // [batch * heads][padded]
  float* bias;          // [batch][tokens]: log2 of sizes, or null
  const float *input_q, *input_k;
};

// Transposes proj_k and packs proj_q in blocks of 16 channels.
void PackProjections(const SelectJob& job) {
  const size_t d = job.in.width, c = job.settings.channels;
  for (size_t h = 0; h < job.in.heads; ++h) {
    for (size_t k = 0; k < d; ++k) {
      for (size_t j = 0; j < c; ++j) {
        job.proj_k[(h * c + j) * job.stride + k] = job.input_k[(h * d + k) * c + j];
      }
      for (size_t j = 0; j < job.lane_blocks * kQueries; ++j) {
        job.proj_q[((h * job.lane_blocks + j / kQueries) * d + k) * kQueries + j % kQueries] =
            j < c ? job.in.scale * kLog2e * job.input_q[(h * d + k) * c + j] : 0.0f;
      }
    }
  }
}

// Returns the sizes of an image's tokens from `token` on, or null.
HWY_INLINE const float* SizesOf(const Packed& in, size_t batch, size_t token) {
  return in.sizes == nullptr ? nullptr : in.sizes + batch * in.tokens + token;
}

// Working memory for a block of projected keys or the bonus of a pool.
struct PrepareWork {
  float *turned, *mean, *squares;
};

HWY_INLINE size_t LayOut(const SelectJob& job, void* base, PrepareWork* work) {
  Layout layout(base);
  work->turned = layout.Take<float>(job.in.width, kQueries);
  work->mean = layout.Take<float>(job.stride);
  work->squares = layout.Take<float>(job.pool_run + kQueries);
  return layout.used();
}

// Computes the bonus of one pool (64 keys if there are no pools): value_power * log2(distance of each value from the
// mean value of the pool).
HWY_INLINE void Bonus(const SelectJob& job, size_t batch_head, size_t pool, const PrepareWork& work) {
  const Packed& in = job.in;
  const D d;
  const size_t run = job.pool_run, begin = pool * run, end = std::min(begin + run, job.patches);
  const float* values = in.Rows(batch_head, 2) + (job.settings.prefix + begin) * in.Row();
  float* bonus = job.bonus + batch_head * job.padded;
  if (job.settings.value_power == 0) {
    std::fill(bonus + begin, bonus + end, 0.0f);
    return;
  }
  float *mean = work.mean, *squares = work.squares;
  if (job.settings.key_pool != 0) {
    const float* sizes = SizesOf(in, batch_head / in.heads, job.settings.prefix + begin);
    PoolMeans(values, in.Row(), sizes, end - begin, run, in.width, job.stride, mean);
  } else {
    std::memset(mean, 0, job.stride * sizeof(float));
  }
  for (size_t i = 0; i < end - begin; ++i) {
    const float* value = values + i * in.Row();
    V sum = hn::Zero(d);
    for (size_t c = 0; c < in.width; c += kLanes) {
      const size_t some = std::min(kLanes, in.width - c);
      const V x = hn::Sub(LoadSome(value + c, some), hn::Load(d, mean + c));
      sum = hn::MulAdd(x, x, sum);
    }
    squares[i] = hn::ReduceSum(d, sum);
  }
  const V floor = hn::Set(d, kDeviationFloor * kDeviationFloor);
  for (size_t i = 0; i < end - begin; i += kLanes) {
    const V square = hn::Load(d, squares + i);
    // Max may replace NaN with the floor, so NaN is restored.
    const V log = hn::Mul(hn::Log(d, hn::Max(square, floor)), hn::Set(d, 0.5f * kLog2e * job.settings.value_power));
    hn::StoreN(hn::IfThenElse(hn::IsNaN(square), square, log), d, bonus + begin + i, std::min(kLanes, end - begin - i));
  }
}

// Projects 16 keys.
HWY_INLINE void ProjectKeys(const SelectJob& job, size_t batch_head, size_t block, const PrepareWork& work) {
  const Packed& in = job.in;
  const size_t begin = block * kQueries, valid = std::min(kQueries, job.patches - begin);
  const size_t c = job.settings.channels, row = in.Row();
  const float* keys = in.Rows(batch_head, 1) + (job.settings.prefix + begin) * row;
  const float* rows[kQueries];
  QueryRows(keys, row, valid, rows);
  Transpose16(rows, in.width, 1.0f, work.turned);
  Scores<Floats, false>(work.turned, job.proj_k + batch_head % in.heads * c * job.stride, job.stride, in.width, c,
                job.projected_k + (batch_head * (job.padded / kQueries) + block) * c * kQueries);
}

// Prepares what all tiles of a head share: a block of projected keys, or the bonus of a pool.
HWY_NOINLINE void PrepareItem(void* data, size_t item, void* base) {
  const SelectJob& job = *static_cast<const SelectJob*>(data);
  PrepareWork work;
  LayOut(job, base, &work);
  const size_t blocks = job.padded / kQueries, units = blocks + job.runs;
  const size_t unit = item % units, batch_head = item / units;
  if (unit < blocks) {
    ProjectKeys(job, batch_head, unit, work);
  } else {
    Bonus(job, batch_head, unit - blocks, work);
  }
}

constexpr size_t kPooledQueries = 16;  // pooled queries that are scored together

// Computes and projects up to 16 pooled queries from `pooled_query` on: projected_q [16][projected_q_stride].
HWY_INLINE void ProjectPooledQueries(const SelectJob& job, size_t batch_head, size_t pooled_query, size_t count,
                              float* HWY_RESTRICT means, float* HWY_RESTRICT wide,
                              float* HWY_RESTRICT projected_q) {
  const Packed& in = job.in;
  const size_t c = job.settings.channels, run = job.settings.query_pool;
  const size_t begin = pooled_query * run, end = std::min(begin + count * run, job.patches);
  const size_t token = job.settings.prefix + begin;
  const float* sizes = SizesOf(in, batch_head / in.heads, token);
  PoolMeans(in.Rows(batch_head, 0) + token * in.Row(), in.Row(), sizes, end - begin, run, in.width,
            job.stride, means);
  for (size_t b = 0; b < job.lane_blocks; ++b) {
    const float* proj_q = job.proj_q + (batch_head % in.heads * job.lane_blocks + b) * in.width * kQueries;
    Scores<Floats, true>(proj_q, means, job.stride, in.width, count, wide);
    const size_t some = std::min(kQueries, c - b * kQueries);
    for (size_t g = 0; g < count; ++g) {
      std::memcpy(projected_q + g * job.projected_q_stride + b * kQueries, wide + g * kQueries, some * sizeof(float));
    }
  }
}

// Computes logits[g][padded] of `count` pooled queries, and (if `normalise`) the log2-sum-exp2 of each row, else 0.
HWY_INLINE void PooledLogits(const SelectJob& job, size_t batch_head, const float* projected_q, size_t count,
                            bool normalise, float* HWY_RESTRICT logits, float* HWY_RESTRICT log_sums) {
  const D d;
  const size_t c = job.settings.channels, blocks = job.padded / kQueries;
  const float* projected_k = job.projected_k + batch_head * blocks * c * kQueries;
  for (size_t block = 0; block < blocks; ++block) {
    Scores<Floats, true>(projected_k + block * c * kQueries, projected_q, job.projected_q_stride, c, count,
                 logits + block * kQueries, job.padded);
  }
  for (size_t g = 0; g < count; ++g) {
    float* HWY_RESTRICT row = logits + g * job.padded;
    if (job.bias != nullptr) {
      const float* bias = job.bias + batch_head / job.in.heads * job.in.tokens + job.settings.prefix;
      for (size_t j = 0; j < job.patches; j += kLanes) {
        const size_t some = std::min(kLanes, job.patches - j);
        hn::Store(hn::Add(hn::Load(d, row + j), hn::LoadN(d, bias + j, some)), d, row + j);
      }
    }
    std::fill(row + job.patches, row + job.padded, kLowest);
    log_sums[g] = 0.0f;
    if (!normalise) continue;
    V highest = hn::Load(d, row);
    for (size_t j = kLanes; j < job.padded; j += kLanes) highest = hn::Max(highest, hn::Load(d, row + j));
    const float top = hn::ReduceMax(d, highest);
    const V t = hn::Set(d, top);
    V even = hn::Zero(d), odd = hn::Zero(d);
    size_t j = 0;
    for (; j + 2 * kLanes <= job.padded; j += 2 * kLanes) {
      even = hn::Add(even, Exp2(hn::Sub(hn::Load(d, row + j), t)));
      odd = hn::Add(odd, Exp2(hn::Sub(hn::Load(d, row + j + kLanes), t)));
    }
    if (j < job.padded) even = hn::Add(even, Exp2(hn::Sub(hn::Load(d, row + j), t)));
    log_sums[g] = top + std::log2(hn::ReduceSum(d, hn::Add(even, odd)));
  }
}

// Lowest and highest score of a row.
struct Range {
  float low, high;
};

// Updates the scores of a tile with `count` pooled queries: best[j] is the maximum of their log-probabilities and, if
// `more`, of the previous best[j]. The last call adds the bonus, replaces NaN scores with -inf and sets padding to NaN.
// Returns the range of the scores, which is meaningful after the last call.
HWY_INLINE Range TileScores(const SelectJob& job, size_t batch_head, const float* logits, const float* log_sums,
                            size_t count, bool more, bool last, float* HWY_RESTRICT best) {
  const D d;
  const float* bonus = job.bonus + batch_head * job.padded;
  V low = hn::Set(d, std::numeric_limits<float>::infinity()), high = hn::Set(d, kLowest);
  for (size_t j = 0; j < job.padded; j += kLanes) {
    V x = hn::Sub(hn::Load(d, logits + j), hn::Set(d, log_sums[0]));
    for (size_t g = 1; g < count; ++g) {
      x = hn::Max(x, hn::Sub(hn::Load(d, logits + g * job.padded + j), hn::Set(d, log_sums[g])));
    }
    if (more) x = hn::Max(x, hn::Load(d, best + j));
    if (last) {
      x = hn::Add(x, hn::Load(d, bonus + j));
      x = hn::IfThenElse(hn::IsNaN(x), hn::Set(d, kLowest), x);
      if (j + kLanes <= job.patches) {
        low = hn::Min(low, x);
        high = hn::Max(high, x);
      } else {
        // The mask is made from a count, not from indices in float32, which cannot represent odd numbers above 2^24.
        const auto real = hn::FirstN(d, job.patches > j ? job.patches - j : 0);
        low = hn::Min(low, hn::IfThenElse(real, x, low));
        high = hn::Max(high, hn::IfThenElse(real, x, high));
        x = hn::IfThenElse(real, x, hn::NaN(d));
      }
    }
    hn::Store(x, d, best + j);
  }
  return {hn::ReduceMin(d, low), hn::ReduceMax(d, high)};
}

// Returns the number of tiles whose pooled queries are scored together.
HWY_INLINE size_t GroupTiles(const SelectSettings& s) {
  return std::max<size_t>(1, kPooledQueries / (s.tile / s.query_pool));
}

// Working memory for a group of tiles.
struct SelectWork {
  float *means, *wide, *projected_q, *logits, *best, *rest;
};

HWY_INLINE size_t LayOut(const SelectJob& job, void* base, SelectWork* work) {
  Layout layout(base);
  work->means = layout.Take<float>(kPooledQueries, job.stride);
  work->wide = layout.Take<float>(kPooledQueries, kQueries);
  work->projected_q = layout.Take<float>(kPooledQueries, job.projected_q_stride);
  work->logits = layout.Take<float>(job.rows, job.padded);
  work->best = layout.Take<float>(job.padded);
  work->rest = layout.Take<float>(job.padded + 32);
  return layout.used();
}

// Selects the keys of a group of tiles, or of one tile with more than kPooledQueries pooled queries.
HWY_NOINLINE void SelectGroup(void* data, size_t item, void* base) {
  const SelectJob& job = *static_cast<const SelectJob*>(data);
  const SelectSettings& s = job.settings;
  const size_t group_tiles = GroupTiles(s), groups = Groups(job.tiles, group_tiles);
  const size_t group = item % groups, batch_head = item / groups;
  const size_t per_tile = s.tile / s.query_pool;
  SelectWork work;
  LayOut(job, base, &work);
  float *means = work.means, *wide = work.wide, *projected_q = work.projected_q;
  float *logits = work.logits, *best = work.best;
  float log_sums[kPooledQueries];
  const size_t first = group * group_tiles, end = std::min(first + group_tiles, job.tiles);
  const auto choose = [&](size_t tile, Range range, float guess) {
    // `low` must be below every score, so take the next float below the lowest one.
    const float low = range.low == kLowest ? kLowest : Unordered(Ordered(range.low) - 1);
    return BestKeys(best, job.padded, job.patches, s.keys, low, range.high, guess, work.rest,
                    job.indices + (batch_head * job.tiles + tile) * s.keys);
  };
  float guess = std::numeric_limits<float>::quiet_NaN();
  if (per_tile <= kPooledQueries) {
    const size_t pooled_query = first * per_tile, count = std::min(end * per_tile, job.pooled_queries) - pooled_query;
    ProjectPooledQueries(job, batch_head, pooled_query, count, means, wide, projected_q);
    PooledLogits(job, batch_head, projected_q, count, per_tile > 1, logits, log_sums);
    for (size_t tile = first; tile < end; ++tile) {
      const size_t from = (tile - first) * per_tile, some = std::min(per_tile, count - from);
      const Range range =
          TileScores(job, batch_head, logits + from * job.padded, log_sums + from, some, false, true, best);
      guess = choose(tile, range, guess);
    }
    return;
  }
  const size_t pooled_end = std::min((first + 1) * per_tile, job.pooled_queries);
  Range range{};
  for (size_t pooled_query = first * per_tile; pooled_query < pooled_end; pooled_query += kPooledQueries) {
    const size_t count = std::min(kPooledQueries, pooled_end - pooled_query);
    ProjectPooledQueries(job, batch_head, pooled_query, count, means, wide, projected_q);
    PooledLogits(job, batch_head, projected_q, count, true, logits, log_sums);
    range = TileScores(job, batch_head, logits, log_sums, count, pooled_query != first * per_tile,
                       pooled_query + kPooledQueries >= pooled_end, best);
  }
  choose(first, range, guess);
}

bool KeySelectTarget(const Packed& in, const float* proj_q, const float* proj_k, const SelectSettings& settings,
                     int32_t* indices, const Call& call) {
  if (in.batch == 0) return true;
  SelectJob job{};
  job.in = in;
  job.settings = settings;
  job.indices = indices;
  job.input_q = proj_q;
  job.input_k = proj_k;
  job.patches = in.tokens - settings.prefix;
  job.padded = RoundUp(job.patches, kQueries);
  job.pooled_queries = Groups(job.patches, settings.query_pool);
  job.tiles = Groups(job.patches, settings.tile);
  job.pool_run = std::min(settings.key_pool ? settings.key_pool : 64, job.patches);
  job.runs = Groups(job.patches, job.pool_run);
  job.stride = PackedWidth(in.width);
  job.lane_blocks = Groups(settings.channels, kQueries);
  job.projected_q_stride = job.lane_blocks * kQueries;
  job.rows = RoundUp(std::min(kPooledQueries, job.pooled_queries), kPaddedRows);
  const size_t heads = in.batch * in.heads, blocks = job.padded / kQueries;
  const bool shared = call.Share([&](Layout* layout) {
    job.proj_k = layout->Take<float>(in.heads, settings.channels, job.stride);
    job.proj_q = layout->Take<float>(in.heads, job.lane_blocks, in.width, kQueries);
    job.projected_k = layout->Take<float>(heads, job.padded, settings.channels);
    job.bonus = layout->Take<float>(heads, job.padded);
    job.bias = in.sizes == nullptr ? nullptr : layout->Take<float>(in.batch, in.tokens);
  });
  if (!shared) return false;
  PackProjections(job);
  if (in.sizes != nullptr) LogSizes(in.sizes, in.batch * in.tokens, job.bias);
  PrepareWork prepare;
  SelectWork select;
  const size_t group_tiles = GroupTiles(settings);
  return call.For(heads * (blocks + job.runs), LayOut(job, nullptr, &prepare), PrepareItem, &job) &&
         call.For(heads * Groups(job.tiles, group_tiles), LayOut(job, nullptr, &select), SelectGroup, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool KeySelect(const Packed& in, const float* proj_q, const float* proj_k, const SelectSettings& settings,
               int32_t* indices, const Call& call) {
  return SPARSIFINER_BUILT(KeySelectTarget)(in, proj_q, proj_k, settings, indices, call);
}

}  // namespace sparsifiner
#endif

// DenseAttention and SparseAttention (ops/schema.py).

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// Pointers to up to 16 rows of queries; missing ones repeat the first, whose results nobody stores.
HWY_INLINE void QueryRows(const float* first, size_t row, size_t valid, const float** rows) {
  for (size_t i = 0; i < kQueries; ++i) rows[i] = first + (i < valid ? i : 0) * row;
}

// Tokens of a list: prefix first, then the patches listed, clamped to those that exist.
struct List {
  const int32_t* patches;
  size_t prefix, count, limit;

  HWY_INLINE size_t At(size_t j) const {
    if (j < prefix) return j;
    return prefix + std::min(static_cast<size_t>(static_cast<uint32_t>(patches[j - prefix])), limit - 1);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One query against many keys, lanes are channels: prefix tokens, and lists that belong to one query alone.

// list: tokens to read, or null for all of [0, count). output: `width` floats.
HWY_NOINLINE void AttendOne(const float* query, const float* keys, const float* values, size_t row, const List* list,
                            size_t count, float scale, size_t width, float* HWY_RESTRICT weights,
                            float* HWY_RESTRICT output) {
  const D d;
  const auto at = [&](size_t j) -> size_t { return list == nullptr ? j : list->At(j); };
  const size_t whole = width / kLanes * kLanes;
  float highest = kLowest;
  for (size_t j = 0; j < count; ++j) {
    const float* key = keys + at(j) * row;
    V sum = hn::Zero(d);
    for (size_t c = 0; c < whole; c += kLanes) sum = hn::MulAdd(hn::LoadU(d, query + c), hn::LoadU(d, key + c), sum);
    if (whole < width) {
      sum = hn::MulAdd(hn::LoadN(d, query + whole, width - whole), hn::LoadN(d, key + whole, width - whole), sum);
    }
    weights[j] = scale * kLog2e * hn::ReduceSum(d, sum);
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
      even = hn::MulAdd(hn::Set(d, weights[j]), some == kLanes ? hn::LoadU(d, x) : hn::LoadN(d, x, some), even);
      odd = hn::MulAdd(hn::Set(d, weights[j + 1]), some == kLanes ? hn::LoadU(d, y) : hn::LoadN(d, y, some), odd);
    }
    if (j < count) {
      const float* x = values + at(j) * row + c;
      even = hn::MulAdd(hn::Set(d, weights[j]), some == kLanes ? hn::LoadU(d, x) : hn::LoadN(d, x, some), even);
    }
    hn::StoreN(hn::Mul(share, hn::Add(even, odd)), d, output + c, some);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Dense: tiles of 16 queries share chunks of packed keys and values, softmax is carried from chunk to chunk.

constexpr size_t kDenseTiles = 8;
constexpr size_t kDenseKeys = 64;

struct DenseJob {
  Packed in;
  float* output;
  size_t groups;  // of kDenseTiles tiles, per head
};

HWY_NOINLINE void DenseGroup(void* data, size_t item) {
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

  float *qt = nullptr, *keys = nullptr, *values = nullptr, *scores = nullptr, *sums = nullptr, *state = nullptr;
  void* base = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Layout layout(base);
    qt = layout.Take<float>(tiles * width * kQueries);
    keys = layout.Take<float>(kDenseKeys * stride);
    values = layout.Take<float>(kDenseKeys * stride);
    scores = layout.Take<float>(kDenseKeys * kQueries);
    sums = layout.Take<float>(tiles * kQueries * stride);
    state = layout.Take<float>(tiles * 2 * kQueries);
    if (pass == 0) base = OwnScratch().Reserve(layout.used());
  }
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

void DenseAttentionTarget(const Packed& in, float* output, const Parallel& parallel) {
  const size_t per_group = kDenseTiles * kQueries;
  DenseJob job{in, output, (in.tokens + per_group - 1) / per_group};
  parallel.For(in.batch * in.heads * job.groups, DenseGroup, &job);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sparse.

struct SparseJob {
  Packed in;
  SparseSettings settings;
  const int32_t* indices;
  float* output;
  size_t patches, tiles, cells, stride;
  const float* cell_keys;    // [batch * heads][cells][stride]
  const float* cell_values;  // the same
  const float* logs;         // log2 of 0..cell; of 0: the lowest float
  const uint16_t* cell_of;   // [patches]
};

HWY_NOINLINE void MeansOfHead(void* data, size_t item) {
  const SparseJob& job = *static_cast<const SparseJob*>(data);
  const Packed& in = job.in;
  const size_t which = item % 2, head = item / 2 % in.heads, batch = item / 2 / in.heads;
  const float* rows = which ? in.Values(batch, head) : in.Keys(batch, head);
  const float* means = which ? job.cell_values : job.cell_keys;
  CellMeans(rows + job.settings.prefix * in.Row(), in.Row(), job.patches, job.settings.cell, in.width, job.stride,
            const_cast<float*>(means) + (batch * in.heads + head) * job.cells * job.stride);
}

// Logits of the cells, less what was selected. selected: [count][16] logits of the listed keys; cells: [R][16], on entry
// those of whole cells, on exit those of the rest, raised by the log of its number. sums: scratch [R][16].
HWY_INLINE void RestOfCells(const SparseJob& job, const uint16_t* owner, size_t count, const float* selected,
                            const uint32_t* number, float* HWY_RESTRICT sums, float* HWY_RESTRICT cells) {
  const D d;
  std::memset(sums, 0, job.cells * kQueries * sizeof(float));
  for (size_t v = 0; v < kQueries; v += kLanes) {
    // Lists ascend, so that a cell's keys come in one run; any other order is right too, and slower.
    for (size_t j = 0; j < count;) {
      const size_t cell = owner[j];
      V sum = hn::Load(d, selected + j * kQueries + v);
      for (++j; j < count && owner[j] == cell; ++j) sum = hn::Add(sum, hn::Load(d, selected + j * kQueries + v));
      hn::Store(hn::Add(sum, hn::Load(d, sums + cell * kQueries + v)), d, sums + cell * kQueries + v);
    }
    for (size_t r = 0; r < job.cells; ++r) {
      const size_t size = std::min(job.settings.cell, job.patches - r * job.settings.cell);
      const size_t listed = std::min<size_t>(number[r], size), rest = size - listed;
      const V whole = hn::Load(d, cells + r * kQueries + v);
      const V taken = hn::NegMulAdd(hn::Set(d, static_cast<float>(listed)), whole, hn::Load(d, sums + r * kQueries + v));
      const V share = hn::Set(d, rest ? -1.0f / static_cast<float>(rest) : 0.0f);
      hn::Store(hn::Add(hn::MulAdd(taken, share, whole), hn::Set(d, job.logs[rest])), d, cells + r * kQueries + v);
    }
  }
}

// Values weighed at a time: they stay in the first-level cache for all passes over them.
constexpr size_t kChunk = 64;
// Entries after the last place, which blocks may fetch ahead.
constexpr size_t kPlacesAhead = 32;

HWY_INLINE void Gather(const float* from, const uint32_t* places, size_t count, size_t width, size_t stride,
                       float* HWY_RESTRICT to) {
  for (size_t j = 0; j < count; ++j, to += stride) PackRow(from + places[j], width, stride, to);
}

// scores[j][16] of the keys at `places`, a block of which is gathered at a time, while the next is fetched.
HWY_INLINE void GatherScores(const float* qt, const float* keys, const uint32_t* places, size_t count, size_t width,
                             size_t stride, float* HWY_RESTRICT gathered, float* HWY_RESTRICT scores) {
  size_t j = 0;
  if (width == 64) {
    for (; j + kKeyBlock <= count; j += kKeyBlock) {
      Gather(keys, places + j, kKeyBlock, 64, 64, gathered);
      ScoreBlock<kKeyBlock, true>(qt, gathered, 64, 64, scores + j * kQueries, kQueries, keys,
                                  places + j + kKeyBlock);
    }
  }
  for (; j < count; j += kKeyBlock) {
    const size_t some = std::min(kKeyBlock, count - j);
    Gather(keys, places + j, some, width, stride, gathered);
    Scores<true>(qt, gathered, stride, width, some, scores + j * kQueries);
  }
}

// Softmax of a tile over listed keys and cells. On entry logits, on exit weights: scores [count][16], cells [R][16];
// shares [16]: what makes them sum to 1. sums: scratch [R][16].
HWY_NOINLINE void WeighTile(const SparseJob& job, size_t count, const uint16_t* owner, const uint32_t* number,
                            float* HWY_RESTRICT scores, float* HWY_RESTRICT cells, float* HWY_RESTRICT sums,
                            float* HWY_RESTRICT shares) {
  const SparseSettings& s = job.settings;
  const D d;
  const size_t rows = count + job.cells;
  for (size_t v = 0; v < kQueries; v += kLanes) {
    V top = hn::Load(d, scores + v);
    for (size_t j = 1; j < rows; ++j) top = hn::Max(top, hn::Load(d, scores + j * kQueries + v));
    V total = hn::Zero(d);
    for (size_t r = 0; r < job.cells; ++r) {
      const size_t size = std::min(s.cell, job.patches - r * s.cell);
      const size_t rest = size - std::min<size_t>(number[r], size);
      const V weight = Exp2(hn::Sub(hn::Load(d, cells + r * kQueries + v), top));
      total = hn::Add(total, rest ? weight : hn::Zero(d));
      // Each of the rest has this share. The cell's mean value stands for all its tokens, so those that were selected
      // must give their share back.
      const V share = hn::Mul(weight, hn::Set(d, rest ? 1.0f / static_cast<float>(rest) : 0.0f));
      hn::Store(share, d, sums + r * kQueries + v);
      hn::Store(hn::Mul(share, hn::Set(d, static_cast<float>(size))), d, cells + r * kQueries + v);
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
      const V back = job.cells ? hn::Load(d, sums + owner[j - s.prefix_keys] * kQueries + v) : hn::Zero(d);
      hn::Store(hn::Sub(weight, back), d, scores + j * kQueries + v);
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

// Which cell each listed key lies in, and how many of each cell's keys are listed. number: [4][R], of which the first row
// is the result: counting in turn spares each addition the wait for the one before.
HWY_INLINE void CountListed(const SparseJob& job, const List& list, size_t count, uint16_t* HWY_RESTRICT owner,
                            uint32_t* HWY_RESTRICT number) {
  const uint32_t most = static_cast<uint32_t>(list.limit - 1);
  std::memset(number, 0, 4 * job.cells * sizeof(uint32_t));
  for (size_t j = 0; j < count; ++j) {
    owner[j] = job.cell_of[std::min(static_cast<uint32_t>(list.patches[j]), most)];
    ++number[j % 4 * job.cells + owner[j]];
  }
  for (size_t r = 0; r < job.cells; ++r) {
    number[r] += number[job.cells + r] + number[2 * job.cells + r] + number[3 * job.cells + r];
  }
}

// A tile of at most 16 queries [begin, begin + valid) with one list.
HWY_NOINLINE void AttendTile(const SparseJob& job, size_t batch, size_t head, size_t begin, size_t valid,
                             const List& list, bool placed, uint32_t* places, float* gathered,
                             float* partial, uint16_t* owner, uint32_t* number, float* qt, float* scores, float* sums) {
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t width = in.width, stride = job.stride, row = in.Row();
  const size_t count = list.count;
  const float* query_rows[kQueries];
  QueryRows(in.Queries(batch, head) + begin * row, row, valid, query_rows);
  Transpose16(query_rows, width, in.scale * kLog2e, qt);
  if (!placed) {
    const uint32_t first = static_cast<uint32_t>(list.prefix), most = static_cast<uint32_t>(list.limit - 1);
    const uint32_t step = static_cast<uint32_t>(row);
    for (uint32_t j = 0; j < first; ++j) places[j] = j * step;
    for (size_t j = 0; j < s.keys; ++j) {
      places[first + j] = (first + std::min(static_cast<uint32_t>(list.patches[j]), most)) * step;
    }
    std::fill(places + count, places + count + kPlacesAhead, places[count - 1]);
    if (job.cells != 0) CountListed(job, list, s.keys, owner, number);
  }
  GatherScores(qt, in.Keys(batch, head), places, count, width, stride, gathered, scores);
  const size_t of_head = (batch * in.heads + head) * job.cells * stride;
  float* cells = scores + count * kQueries;
  if (job.cells != 0) {
    Scores<true>(qt, job.cell_keys + of_head, stride, width, job.cells, cells);
    RestOfCells(job, owner, s.keys, scores + s.prefix_keys * kQueries, number, sums, cells);
  }

  HWY_ALIGN float shares[kQueries];
  WeighTile(job, count, owner, number, scores, cells, sums, shares);
  float* output = job.output + ((batch * in.tokens + begin) * in.heads + head) * width;
  const Weighted background{cells, job.cell_values + of_head, job.cells, nullptr};
  const float* values = in.Values(batch, head);
  const bool in_place = width % kLanes == 0;
  const size_t chunks = (count + kChunk - 1) / kChunk, chunk = (count + chunks - 1) / chunks;
  for (size_t start = 0; start < count; start += chunk) {
    const size_t some = std::min(chunk, count - start);
    if (!in_place) Gather(values, places + start, some, width, stride, gathered);
    const Weighted parts[2] = {
        {scores + start * kQueries, in_place ? values : gathered, some, in_place ? places + start : nullptr}, background};
    const bool last = start + some == count;
    const size_t number_of_parts = last && job.cells != 0 ? 2 : 1;
    float* to = last ? output : partial;
    const size_t to_stride = last ? in.heads * width : stride;
    const float* factor = last ? shares : nullptr;
    const size_t rows_out = last ? valid : kQueries, columns = last ? width : stride;
    if (start == 0) {
      Accumulate<false, false>(parts, number_of_parts, stride, nullptr, nullptr, factor, rows_out, columns, to,
                               to_stride);
    } else {
      Accumulate<true, false>(parts, number_of_parts, stride, partial, nullptr, factor, rows_out, columns, to,
                              to_stride);
    }
  }
}

HWY_NOINLINE void SparseItem(void* data, size_t item) {
  const SparseJob& job = *static_cast<const SparseJob*>(data);
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t units = job.tiles + s.prefix;
  const size_t unit = item % units, head = item / units % in.heads, batch = item / units / in.heads;
  const size_t count = s.prefix_keys + s.keys;
  const bool prefix_row = unit >= job.tiles;

  float *gathered = nullptr, *partial = nullptr, *qt = nullptr, *scores = nullptr, *sums = nullptr;
  uint16_t* owner = nullptr;
  uint32_t *number = nullptr, *places = nullptr;
  void* base = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Layout layout(base);
    gathered = layout.Take<float>(kChunk * job.stride);
    partial = layout.Take<float>(kQueries * job.stride);
    qt = layout.Take<float>(in.width * kQueries);
    scores = layout.Take<float>(std::max((count + job.cells + kPaddedRows) * kQueries, in.tokens));
    sums = layout.Take<float>(job.cells * kQueries);
    owner = layout.Take<uint16_t>(s.keys);
    places = layout.Take<uint32_t>(count + kPlacesAhead);
    number = layout.Take<uint32_t>(4 * job.cells);
    if (pass == 0) base = OwnScratch().Reserve(layout.used());
  }
  const auto query = [&](size_t token) { return in.Queries(batch, head) + token * in.Row(); };
  const auto result = [&](size_t token) {
    return job.output + ((batch * in.tokens + token) * in.heads + head) * in.width;
  };
  if (prefix_row) {
    const size_t token = unit - job.tiles;
    AttendOne(query(token), in.Keys(batch, head), in.Values(batch, head), in.Row(), nullptr, in.tokens, in.scale,
              in.width, scores, result(token));
    return;
  }
  const int32_t* patches = job.indices + ((batch * in.heads + head) * job.tiles + unit) * s.keys;
  const List list{patches, s.prefix_keys, count, in.tokens - s.prefix_keys};
  if (s.tile == 1 && job.cells == 0) {
    const size_t token = s.prefix + unit;
    AttendOne(query(token), in.Keys(batch, head), in.Values(batch, head), in.Row(), &list, count, in.scale, in.width,
              scores, result(token));
    return;
  }
  const size_t begin = s.prefix + unit * s.tile, end = std::min(begin + s.tile, in.tokens);
  for (size_t some = begin; some < end; some += kQueries) {
    AttendTile(job, batch, head, some, std::min(kQueries, end - some), list, some != begin,
               places, gathered, partial, owner, number, qt, scores, sums);
  }
}

void SparseAttentionTarget(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                           const Parallel& parallel) {
  SparseJob job{};
  job.in = in;
  job.settings = settings;
  job.indices = indices;
  job.output = output;
  job.patches = in.tokens - settings.prefix;
  job.tiles = (job.patches + settings.tile - 1) / settings.tile;
  job.cells = settings.cell ? (job.patches + settings.cell - 1) / settings.cell : 0;
  job.stride = PackedWidth(in.width);
  if (job.cells != 0) {
    float *keys = nullptr, *values = nullptr, *logs = nullptr;
    uint16_t* cell_of = nullptr;
    void* base = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      Layout layout(base);
      keys = layout.Take<float>((in.batch * in.heads * job.cells + kPaddedRows) * job.stride);
      values = layout.Take<float>(in.batch * in.heads * job.cells * job.stride);
      logs = layout.Take<float>(settings.cell + 1);
      cell_of = layout.Take<uint16_t>(job.patches);
      if (pass == 0) base = SharedScratch().Reserve(layout.used());
    }
    logs[0] = kLowest;
    for (size_t n = 1; n <= settings.cell; ++n) logs[n] = std::log2(static_cast<float>(n));
    for (size_t j = 0; j < job.patches; ++j) cell_of[j] = static_cast<uint16_t>(j / settings.cell);
    job.cell_keys = keys;
    job.cell_values = values;
    job.logs = logs;
    job.cell_of = cell_of;
    parallel.For(in.batch * in.heads * 2, MeansOfHead, &job);
  }
  parallel.For(in.batch * in.heads * (job.tiles + settings.prefix), SparseItem, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

HWY_EXPORT(DenseAttentionTarget);
HWY_EXPORT(SparseAttentionTarget);

void DenseAttention(const Packed& in, float* output, const Parallel& parallel) {
  HWY_DYNAMIC_DISPATCH(DenseAttentionTarget)(in, output, parallel);
}

void SparseAttention(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                     const Parallel& parallel) {
  HWY_DYNAMIC_DISPATCH(SparseAttentionTarget)(in, indices, settings, output, parallel);
}

}  // namespace sparsifiner
#endif

// SparseAttention (ops/schema.py): each tile of queries attends to the prefix, to its listed keys, and to background
// cells that stand for what it did not list.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sparse.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "sparse-tile-inl.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// ---------------------------------------------------------------------------------------------------------------------
// One query against many keys, lanes are channels: prefix tokens, and lists that belong to one query alone.

// list: tokens to read, or null for all of [0, count). bias: log2 of the tokens' sizes, or null. output: `width` floats.
HWY_NOINLINE void AttendOne(const float* query, const float* keys, const float* values, size_t row, const List* list,
                            size_t count, float scale, size_t width, const float* bias, float* HWY_RESTRICT weights,
                            float* HWY_RESTRICT output) {
  const D d;
  const auto at = [&](size_t j) -> size_t { return list == nullptr ? j : list->At(j); };
  const V share = hn::Set(d, 1.0f / WeighOne(query, keys, row, at, count, scale, width, bias, weights));
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
// Tiles: 16 queries, one list.

// What a thread needs for one tile.
struct Work {
  float *gathered, *partial, *qt, *scores, *sums;
  uint16_t* owner;
  uint32_t *number, *places;
  Rest left;
};

HWY_INLINE size_t LayOut(const SparseJob& job, void* base, Work* work) {
  const size_t count = job.settings.prefix_keys + job.settings.keys;
  Layout layout(base);
  work->gathered = layout.Take<float>(kChunk, job.stride);
  work->partial = layout.Take<float>(kQueries, job.stride);
  work->qt = layout.Take<float>(job.in.width, kQueries);
  work->scores = layout.Take<float>(std::max((count + job.cells + kPaddedRows) * kQueries, job.in.tokens));
  work->sums = layout.Take<float>(job.cells, kQueries);
  work->owner = layout.Take<uint16_t>(job.settings.keys);
  work->places = layout.Take<uint32_t>(count + kPlacesAhead);
  work->number = layout.Take<uint32_t>(4 * job.cells);
  work->left.whole = layout.Take<float>(job.cells);
  work->left.listed = layout.Take<float>(job.cells);
  work->left.rest = layout.Take<float>(job.cells);
  work->left.log_rest = layout.Take<float>(job.cells);
  work->left.sizes = job.bias == nullptr ? nullptr : layout.Take<float>(job.settings.keys);
  return layout.used();
}

// What is left of each cell, once its listed keys are counted.
HWY_INLINE void CountRest(const SparseJob& job, size_t batch, const List& list, const Work& work) {
  const Rest& left = work.left;
  for (size_t r = 0; r < job.cells; ++r) {
    const size_t size = std::min(job.settings.cell, job.patches - r * job.settings.cell);
    const size_t listed = std::min<size_t>(work.number[r], size);
    left.whole[r] = static_cast<float>(size);
    left.listed[r] = static_cast<float>(listed);
    left.rest[r] = static_cast<float>(size - listed);
    left.log_rest[r] = job.logs[size - listed];
  }
  if (job.bias == nullptr) return;
  const float* sizes = job.in.sizes + batch * job.in.tokens + list.prefix;
  std::memset(left.listed, 0, job.cells * sizeof(float));
  for (size_t j = 0; j < job.settings.keys; ++j) {
    left.sizes[j] = sizes[std::min<size_t>(static_cast<uint32_t>(list.patches[j]), list.limit - 1)];
    if (job.cells != 0) left.listed[work.owner[j]] += left.sizes[j];
  }
  for (size_t r = 0; r < job.cells; ++r) {
    left.whole[r] = job.cell_sizes[batch * job.cells + r];
    if (left.rest[r] > 0) {
      left.rest[r] = left.whole[r] - left.listed[r];
      left.log_rest[r] = std::log2(left.rest[r]);
    }
  }
}

// Where the rows of a list lie, as floats from the first token's row; which cells its keys lie in.
HWY_INLINE void PlaceList(const SparseJob& job, size_t batch, const List& list, const Work& work) {
  const uint32_t first = static_cast<uint32_t>(list.prefix), most = static_cast<uint32_t>(list.limit - 1);
  const uint32_t step = static_cast<uint32_t>(job.row);
  for (uint32_t j = 0; j < first; ++j) work.places[j] = j * step;
  for (size_t j = 0; j < job.settings.keys; ++j) {
    work.places[first + j] = (first + std::min(static_cast<uint32_t>(list.patches[j]), most)) * step;
  }
  std::fill(work.places + list.count, work.places + list.count + kPlacesAhead, work.places[list.count - 1]);
  if (job.cells != 0) CountListed(job, list, job.settings.keys, work.owner, work.number);
  CountRest(job, batch, list, work);
}

// output = weights x values of the list and of the cells, a chunk of the list at a time.
HWY_INLINE void SumValues(const SparseJob& job, const float* values, const Weighted& background, const float* shares,
                          size_t count, size_t valid, const Work& work, float* output) {
  const size_t width = job.in.width, stride = job.stride;
  const size_t chunks = (count + kChunk - 1) / kChunk, chunk = (count + chunks - 1) / chunks;
  for (size_t start = 0; start < count; start += chunk) {
    const size_t some = std::min(chunk, count - start);
    const uint32_t* places = work.places + start;
    const Weighted parts[2] = {{work.scores + start * kQueries, values, some, places}, background};
    const bool last = start + some == count;
    const size_t number_of_parts = last && job.cells != 0 ? 2 : 1;
    float* to = last ? output : work.partial;
    const size_t to_stride = last ? job.in.heads * width : stride;
    const float* factor = last ? shares : nullptr;
    const size_t rows = last ? valid : kQueries, columns = last ? width : stride;
    if (start == 0) {
      Accumulate<false, false>(parts, number_of_parts, stride, nullptr, nullptr, factor, rows, columns, to, to_stride);
    } else {
      Accumulate<true, false>(parts, number_of_parts, stride, work.partial, nullptr, factor, rows, columns, to,
                              to_stride);
    }
  }
}

// A tile of at most 16 queries [begin, begin + valid) with one list, which is placed already unless `fresh`.
template <bool kSized>
HWY_NOINLINE void AttendTile(const SparseJob& job, size_t batch, size_t head, size_t begin, size_t valid,
                             const List& list, bool fresh, const Work& work) {
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t width = in.width, stride = job.stride, count = list.count;
  const float* query_rows[kQueries];
  QueryRows(in.Queries(batch, head) + begin * in.Row(), in.Row(), valid, query_rows);
  Transpose16(query_rows, width, in.scale * kLog2e, work.qt);
  if (fresh) PlaceList(job, batch, list, work);
  GatherScores(work.qt, KeysOf(job, batch, head), work.places, count, width, stride, work.gathered, work.scores);
  const size_t of_head = (batch * in.heads + head) * job.cells * stride;
  float* cells = work.scores + count * kQueries;
  if (job.cells != 0) {
    Scores<true>(work.qt, job.cell_keys + of_head, stride, width, job.cells, cells);
    RestOfCells<kSized>(job, work.owner, s.keys, work.scores + s.prefix_keys * kQueries, work.left, work.sums, cells);
  }
  if (kSized) {
    AddBias(job.bias + batch * in.tokens, work.places, static_cast<uint32_t>(job.row), count, work.scores);
  }
  HWY_ALIGN float shares[kQueries];
  WeighTile<kSized>(job, count, work.owner, work.left, work.scores, cells, work.sums, shares);
  const Weighted background{cells, job.cell_values + of_head, job.cells, nullptr};
  SumValues(job, ValuesOf(job, batch, head), background, shares, count, valid, work,
            job.output + ((batch * in.tokens + begin) * in.heads + head) * width);
}

HWY_NOINLINE void SparseItem(void* data, size_t item, void* own) {
  const SparseJob& job = *static_cast<const SparseJob*>(data);
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t units = job.tiles + s.prefix;
  const size_t unit = item % units, head = item / units % in.heads, batch = item / units / in.heads;
  const size_t count = s.prefix_keys + s.keys;
  const bool prefix_row = unit >= job.tiles;
  const float *keys = KeysOf(job, batch, head), *values = ValuesOf(job, batch, head);
  const float* bias = job.bias == nullptr ? nullptr : job.bias + batch * in.tokens;
  Work work;
  LayOut(job, own, &work);
  const auto query = [&](size_t token) { return in.Queries(batch, head) + token * in.Row(); };
  const auto result = [&](size_t token) {
    return job.output + ((batch * in.tokens + token) * in.heads + head) * in.width;
  };
  if (prefix_row) {
    const size_t token = unit - job.tiles;
    AttendOne(query(token), keys, values, job.row, nullptr, in.tokens, in.scale, in.width, bias, work.scores,
              result(token));
    return;
  }
  const int32_t* patches = job.indices + ((batch * in.heads + head) * job.tiles + unit) * s.keys;
  const List list{patches, s.prefix_keys, count, in.tokens - s.prefix_keys};
  if (s.tile == 1 && job.cells == 0) {
    const size_t token = s.prefix + unit;
    AttendOne(query(token), keys, values, job.row, &list, count, in.scale, in.width, bias, work.scores,
              result(token));
    return;
  }
  const size_t begin = s.prefix + unit * s.tile, end = std::min(begin + s.tile, in.tokens);
  for (size_t some = begin; some < end; some += kQueries) {
    const auto attend = bias == nullptr ? AttendTile<false> : AttendTile<true>;
    attend(job, batch, head, some, std::min(kQueries, end - some), list, some == begin, work);
  }
}

bool SparseAttentionTarget(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                           const Parallel& parallel) {
  if (in.batch == 0) return true;
  SparseJob job{};
  job.in = in;
  job.settings = settings;
  job.indices = indices;
  job.output = output;
  job.patches = in.tokens - settings.prefix;
  job.settings.cell = std::min(settings.cell, job.patches);
  job.tiles = (job.patches + settings.tile - 1) / settings.tile;
  job.cells = settings.cell ? (job.patches + job.settings.cell - 1) / job.settings.cell : 0;
  job.stride = PackedWidth(in.width);
  job.run = job.cells ? job.settings.cell : std::min<size_t>(64, job.patches);
  job.runs = (job.patches + job.run - 1) / job.run;
  const size_t heads = in.batch * in.heads;
  const bool pack = in.tokens >= kPackFrom || in.width % kLanes != 0;
  job.row = pack ? job.stride : in.Row();
  float* logs = nullptr;
  uint16_t* cell_of = nullptr;
  void* base = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Layout layout(base);
    job.packed_keys = pack ? layout.Take<float>(heads, in.tokens, job.stride) : nullptr;
    job.packed_values = pack ? layout.Take<float>(heads, in.tokens, job.stride) : nullptr;
    job.cell_keys = layout.Take<float>(heads * job.cells + kPaddedRows, job.stride);
    job.cell_values = layout.Take<float>(heads * job.cells, job.stride);
    logs = layout.Take<float>(job.settings.cell + 1);
    cell_of = layout.Take<uint16_t>(job.patches);
    job.bias = in.sizes == nullptr ? nullptr : layout.Take<float>(in.batch, in.tokens);
    job.cell_sizes = in.sizes == nullptr ? nullptr : layout.Take<float>(in.batch, job.cells);
    if (pass == 0 && (base = parallel.Shared(layout.used())) == nullptr) return false;
  }
  if (job.cells != 0) {
    logs[0] = kLowest;
    for (size_t n = 1; n <= job.settings.cell; ++n) logs[n] = std::log2(static_cast<float>(n));
    for (size_t j = 0; j < job.patches; ++j) cell_of[j] = static_cast<uint16_t>(j / job.settings.cell);
  }
  if (in.sizes != nullptr) {
    LogSizes(in.sizes, in.batch * in.tokens, job.bias);
    std::memset(job.cell_sizes, 0, in.batch * job.cells * sizeof(float));
    for (size_t i = 0; job.cells != 0 && i < in.batch * job.patches; ++i) {
      const size_t batch = i / job.patches, j = i % job.patches;
      job.cell_sizes[batch * job.cells + cell_of[j]] += in.sizes[batch * in.tokens + settings.prefix + j];
    }
  }
  job.logs = logs;
  job.cell_of = cell_of;
  if ((pack || job.cells != 0) && !parallel.For(heads * 2 * job.runs, 0, PrepareRun, &job)) return false;
  Work work;
  return parallel.For(heads * (job.tiles + settings.prefix), LayOut(job, nullptr, &work), SparseItem, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool SparseAttention(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                     const Parallel& parallel) {
  return SPARSIFINER_BUILT(SparseAttentionTarget)(in, indices, settings, output, parallel);
}

}  // namespace sparsifiner
#endif

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
// Tiles: 16 queries, one list.

// One run of a head's keys or values: packed where they shall be, and their mean where there are cells.
HWY_NOINLINE void PrepareRun(void* data, size_t item, void*) {
  const SparseJob& job = *static_cast<const SparseJob*>(data);
  const Packed& in = job.in;
  const size_t run = item % job.runs, which = item / job.runs % 2, batch_head = item / job.runs / 2;
  const size_t head = batch_head % in.heads, batch = batch_head / in.heads;
  const float* rows = which ? in.Values(batch, head) : in.Keys(batch, head);
  const size_t begin = job.settings.prefix + run * job.run, end = std::min(begin + job.run, in.tokens);
  if (job.packed_keys != nullptr) {
    float* packed = (which ? job.packed_values : job.packed_keys) + batch_head * in.tokens * job.stride;
    for (size_t j = run ? begin : 0; j < end; ++j) {
      PackRow(rows + j * in.Row(), in.width, job.stride, packed + j * job.stride);
    }
    rows = packed;
  }
  if (job.cells == 0) return;
  float* means = (which ? job.cell_values : job.cell_keys) + (batch_head * job.cells + run) * job.stride;
  const size_t width = job.packed_keys == nullptr ? in.width : job.stride;
  const float* sizes = in.sizes == nullptr ? nullptr : in.sizes + batch * in.tokens + begin;
  CellMeans(rows + begin * job.row, job.row, sizes, end - begin, job.run, width, job.stride, means);
}

// What a thread needs for one tile.
struct Work : ListWork {
  float *gathered, *partial, *qt;
};

HWY_INLINE size_t LayOut(const SparseJob& job, void* base, Work* work) {
  Layout layout(base);
  work->gathered = layout.Take<float>(kChunk, job.stride);
  work->partial = layout.Take<float>(kQueries, job.stride);
  work->qt = layout.Take<float>(job.in.width, kQueries);
  TakeList(job, &layout, work);
  return layout.used();
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
  Work work;
  LayOut(job, own, &work);
  RunUnit(job, item, work, [&](size_t batch, size_t head, size_t begin, size_t valid, const List& list, bool fresh) {
    const auto attend = job.bias == nullptr ? AttendTile<false> : AttendTile<true>;
    attend(job, batch, head, begin, valid, list, fresh, work);
  });
}

bool SparseAttentionTarget(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                           const Parallel& parallel) {
  if (in.batch == 0) return true;
  SparseJob job = Describe(in, indices, settings, output);
  job.stride = PackedWidth(in.width);
  const size_t heads = in.batch * in.heads;
  const bool pack = in.tokens >= kPackFrom || in.width % kLanes != 0;
  job.row = pack ? job.stride : in.Row();
  void* base = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Layout layout(base);
    job.packed_keys = pack ? layout.Take<float>(heads, in.tokens, job.stride) : nullptr;
    job.packed_values = pack ? layout.Take<float>(heads, in.tokens, job.stride) : nullptr;
    job.cell_keys = layout.Take<float>(heads * job.cells + kPaddedRows, job.stride);
    job.cell_values = layout.Take<float>(heads * job.cells, job.stride);
    TakeTables(&layout, &job);
    if (pass == 0 && (base = parallel.Shared(layout.used())) == nullptr) return false;
  }
  FillTables(job);
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

// SparseAttention and DenseAttention in bfloat16, where the instruction set has its dot product: queries, keys, values
// and weights are rounded, sums and softmax are float32. Rows of prefix tokens stay float32 (sparse-tile-inl.h). Where
// what is listed of a cell far outweighs the rest, and yet the rest attracts more, the cell's rounded weight errs by as
// many times more: selection lists what attracts.

// Built for those sets alone (and the floor, which is empty); in float32 they gain nothing over their lesser ones.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS                                                                             \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_AVX3_DL | HWY_AVX3_SPR | HWY_NEON | HWY_ALL_SVE)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bf16.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "bf16-inl.h"
#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"
#include "sparse-tile-inl.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
#if HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_NEON_BF16

// ---------------------------------------------------------------------------------------------------------------------
// SparseAttention: a tile's list and its cells are rows of one table.

struct WordsJob {
  SparseJob sparse;
  size_t words;                       // of a packed row
  uint32_t *keys, *values;            // [batch * heads][tokens][words]: of two channels
  uint32_t *cell_keys, *cell_values;  // [batch * heads][cells][words]: means of rounded rows
  uint32_t* cell_rests;               // what rounding takes from cell_keys
};

// What a thread needs for one tile.
struct WordsWork : ListWork {
  float *turned, *rests;
  uint32_t *qt, *keys, *values, *weights;
};

HWY_INLINE size_t LayOut(const WordsJob& job, void* base, WordsWork* work) {
  const SparseJob& sparse = job.sparse;
  const size_t rows = sparse.settings.prefix_keys + sparse.settings.keys + sparse.cells, pairs = (rows + 1) / 2;
  Layout layout(base);
  work->turned = layout.Take<float>(sparse.in.width, kQueries);
  work->rests = layout.Take<float>(sparse.cells + kPaddedRows, kQueries);
  work->qt = layout.Take<uint32_t>(job.words, kQueries);
  work->keys = layout.Take<uint32_t>(rows + kPaddedRows, job.words);
  work->values = layout.Take<uint32_t>(pairs, 2 * job.words);
  work->weights = layout.Take<uint32_t>(pairs, kQueries);
  TakeList(sparse, &layout, work);
  return layout.used();
}

// One run of a head's keys or values: packed, and their mean where there are cells.
//
// What a list takes out of a cell is the sum of its rounded keys' logits. So the cell's logit is that of the mean of
// rounded keys, to twice the precision: where little is left of a cell, any difference between both counts many times.
HWY_NOINLINE void PackRun(void* data, size_t item, void* own) {
  const WordsJob& job = *static_cast<const WordsJob*>(data);
  const SparseJob& sparse = job.sparse;
  const Packed& in = sparse.in;
  const size_t run = item % sparse.runs, which = item / sparse.runs % 2, batch_head = item / sparse.runs / 2;
  const size_t head = batch_head % in.heads, batch = batch_head / in.heads;
  const float* rows = which ? in.Values(batch, head) : in.Keys(batch, head);
  const size_t begin = sparse.settings.prefix + run * sparse.run, end = std::min(begin + sparse.run, in.tokens);
  uint32_t* packed = (which ? job.values : job.keys) + batch_head * in.tokens * job.words;
  for (size_t j = run ? begin : 0; j < end; ++j) {
    FetchRow(rows + std::min(j + kRowsAhead, end - 1) * in.Row(), in.width);
    PackWords(rows + j * in.Row(), in.width, job.words, packed + j * job.words);
  }
  if (sparse.cells == 0) return;
  float *mean = static_cast<float*>(own), total = 0.0f;
  std::memset(mean, 0, 2 * job.words * sizeof(float));
  for (size_t j = begin; j < end; ++j) {
    const float size = in.sizes == nullptr ? 1.0f : in.sizes[batch * in.tokens + j];
    AddWords(packed + j * job.words, job.words, size, mean);
    total += size;
  }
  for (size_t c = 0; c < 2 * job.words; ++c) mean[c] *= 1.0f / total;
  const size_t cell = (batch_head * sparse.cells + run) * job.words;
  uint32_t* to = (which ? job.cell_values : job.cell_keys) + cell;
  PackWords(mean, 2 * job.words, job.words, to);
  if (which) return;
  AddWords(to, job.words, -1.0f, mean);
  PackWords(mean, 2 * job.words, job.words, job.cell_rests + cell);
}

// The rows of a list, then the cells: keys as they are, values of two rows together; the last of an odd number counts
// with a weight of 0 for the row that is not there.
HWY_INLINE void GatherWords(const WordsJob& job, size_t batch_head, size_t count, const WordsWork& work) {
  const size_t words = job.words, rows = count + job.sparse.cells;
  const size_t of_head = batch_head * job.sparse.in.tokens * words, of_cells = batch_head * job.sparse.cells * words;
  const auto row = [&](const uint32_t* tokens, const uint32_t* cells, size_t j) {
    return j < count ? tokens + of_head + work.places[j] : cells + of_cells + (j - count) * words;
  };
  for (size_t j = 0; j < rows; ++j) {
    const uint32_t* from = row(job.keys, job.cell_keys, j);
    FetchRow(row(job.keys, job.cell_keys, std::min(j + kRowsAhead, rows - 1)), words);
    FetchRow(row(job.values, job.cell_values, j), words);
    for (size_t w = 0; w < words; w += kLanes) {
      hn::Store(hn::Load(Words(), from + w), Words(), work.keys + j * words + w);
    }
  }
  for (size_t j = 0; j < rows; j += 2) {
    const uint32_t* low = row(job.values, job.cell_values, j);
    const uint32_t* high = j + 1 < rows ? row(job.values, job.cell_values, j + 1) : low;
    Interleave(low, high, words, work.values + j * words);
  }
}

// A tile of at most 16 queries [begin, begin + valid) with one list, which is gathered already unless `fresh`.
template <bool kSized>
HWY_NOINLINE void AttendWords(const WordsJob& job, size_t batch, size_t head, size_t begin, size_t valid,
                              const List& list, bool fresh, const WordsWork& work) {
  const SparseJob& sparse = job.sparse;
  const Packed& in = sparse.in;
  const SparseSettings& s = sparse.settings;
  const size_t count = list.count, rows = count + sparse.cells, batch_head = batch * in.heads + head;
  const float* query_rows[kQueries];
  QueryRows(in.Queries(batch, head) + begin * in.Row(), in.Row(), valid, query_rows);
  Transpose16(query_rows, in.width, in.scale * kLog2e, work.turned);
  PairRows(work.turned, in.width, work.qt);
  const size_t filled = (in.width + 1) / 2;
  std::memset(work.qt + filled * kQueries, 0, (job.words - filled) * kQueries * sizeof(uint32_t));
  if (fresh) {
    PlaceList(sparse, batch, list, work);
    GatherWords(job, batch_head, count, work);
  }
  ScoresOfWords(work.qt, work.keys, job.words, rows, work.scores);
  float* cells = work.scores + count * kQueries;
  if (sparse.cells != 0) {
    ScoresOfWords(work.qt, job.cell_rests + batch_head * sparse.cells * job.words, job.words, sparse.cells, work.rests);
    for (size_t i = 0; i < sparse.cells * kQueries; i += kLanes) {
      hn::Store(hn::Add(hn::Load(D(), cells + i), hn::Load(D(), work.rests + i)), D(), cells + i);
    }
    const float* selected = work.scores + s.prefix_keys * kQueries;
    RestOfCells<kSized>(sparse, work.owner, s.keys, selected, work.left, work.sums, cells);
  }
  if (kSized) {
    AddBias(sparse.bias + batch * in.tokens, work.places, static_cast<uint32_t>(sparse.row), count, work.scores);
  }
  HWY_ALIGN float shares[kQueries];
  WeighTile<kSized>(sparse, count, work.owner, work.left, work.scores, cells, work.sums, shares);
  PairRows(work.scores, rows, work.weights);
  SumWords<false>(work.weights, work.values, (rows + 1) / 2, 2 * job.words, nullptr, nullptr, shares, valid, in.width,
                  sparse.output + ((batch * in.tokens + begin) * in.heads + head) * in.width, in.heads * in.width);
}

HWY_NOINLINE void WordsItem(void* data, size_t item, void* own) {
  const WordsJob& job = *static_cast<const WordsJob*>(data);
  WordsWork work;
  LayOut(job, own, &work);
  const auto tile = [&](size_t batch, size_t head, size_t begin, size_t valid, const List& list, bool fresh) {
    const auto attend = job.sparse.bias == nullptr ? AttendWords<false> : AttendWords<true>;
    attend(job, batch, head, begin, valid, list, fresh, work);
  };
  RunUnit(job.sparse, item, work, tile);
}

bool SparseAttentionTarget(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                         const Parallel& parallel) {
  if (in.batch == 0) return true;
  WordsJob job{};
  SparseJob& sparse = job.sparse;
  sparse = Describe(in, indices, settings, output);
  sparse.row = job.words = PackedWords(in.width);
  const size_t heads = in.batch * in.heads;
  void* base = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Layout layout(base);
    job.keys = layout.Take<uint32_t>(heads, in.tokens, job.words);
    job.values = layout.Take<uint32_t>(heads, in.tokens, job.words);
    job.cell_keys = layout.Take<uint32_t>(heads, sparse.cells, job.words);
    job.cell_values = layout.Take<uint32_t>(heads, sparse.cells, job.words);
    job.cell_rests = layout.Take<uint32_t>(heads * sparse.cells + kPaddedRows, job.words);
    TakeTables(&layout, &sparse);
    if (pass == 0 && (base = parallel.Shared(layout.used())) == nullptr) return false;
  }
  FillTables(sparse);
  const size_t mean = Times(2 * job.words, sizeof(float));
  if (!parallel.For(heads * 2 * sparse.runs, mean, PackRun, &job)) return false;
  WordsWork work;
  return parallel.For(heads * (sparse.tiles + settings.prefix), LayOut(job, nullptr, &work), WordsItem, &job);
}

// ---------------------------------------------------------------------------------------------------------------------
// DenseAttention: as in dense.cc, tiles of 16 queries share chunks of packed keys and values.

constexpr size_t kGroupTiles = 16;
constexpr size_t kGroupKeys = 64;

struct GroupJob {
  Packed in;
  float* output;
  size_t groups, words;
  const float* bias;  // [batch][tokens]: log2 of sizes, or null
};

// What a thread needs for one group.
struct GroupWork {
  float *turned, *scores, *sums, *highest, *totals;
  uint32_t *qt, *keys, *values, *weights, *rows;
};

HWY_INLINE size_t LayOut(const GroupJob& job, void* base, GroupWork* work) {
  const size_t tiles = std::min(kGroupTiles, (job.in.tokens + kQueries - 1) / kQueries);
  Layout layout(base);
  work->turned = layout.Take<float>(job.in.width, kQueries);
  work->scores = layout.Take<float>(kGroupKeys, kQueries);
  work->sums = layout.Take<float>(tiles, kQueries, 2 * job.words);
  work->highest = layout.Take<float>(tiles, kQueries);
  work->totals = layout.Take<float>(tiles, kQueries);
  work->qt = layout.Take<uint32_t>(tiles, job.words, kQueries);
  work->keys = layout.Take<uint32_t>(kGroupKeys, job.words);
  work->values = layout.Take<uint32_t>(kGroupKeys, job.words);
  work->weights = layout.Take<uint32_t>(kGroupKeys / 2, kQueries);
  work->rows = layout.Take<uint32_t>(2, job.words);
  return layout.used();
}

// `count` keys and values from token `start` on, packed.
HWY_INLINE void PackChunk(const GroupJob& job, size_t batch, size_t head, size_t start, size_t count,
                          const GroupWork& work) {
  const Packed& in = job.in;
  const float *keys = in.Keys(batch, head) + start * in.Row(), *values = in.Values(batch, head) + start * in.Row();
  for (size_t j = 0; j < count; ++j) PackWords(keys + j * in.Row(), in.width, job.words, work.keys + j * job.words);
  for (size_t j = 0; j < count; j += 2) {
    for (size_t i = 0; i < 2; ++i) {
      const size_t from = std::min(j + i, count - 1);
      PackWords(values + from * in.Row(), in.width, job.words, work.rows + i * job.words);
    }
    Interleave(work.rows, work.rows + job.words, job.words, work.values + j * job.words);
  }
}

// Softmax is carried from chunk to chunk: logits become weights, and `carry` what the sums so far count.
HWY_INLINE void WeighChunk(size_t count, float* HWY_RESTRICT scores, float* HWY_RESTRICT highest,
                           float* HWY_RESTRICT totals, float* HWY_RESTRICT carry) {
  const D d;
  for (size_t v = 0; v < kQueries; v += kLanes) {
    const V old = hn::Load(d, highest + v);
    V top = old;
    for (size_t j = 0; j < count; ++j) top = hn::Max(top, hn::Load(d, scores + j * kQueries + v));
    V even = hn::Zero(d), odd = hn::Zero(d);
    const auto weigh = [&](size_t j, V* sum) {
      const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
      hn::Store(weight, d, scores + j * kQueries + v);
      *sum = hn::Add(*sum, weight);
    };
    size_t j = 0;
    for (; j + 2 <= count; j += 2) {
      weigh(j, &even);
      weigh(j + 1, &odd);
    }
    if (j < count) weigh(j, &even);
    const V factor = Exp2(hn::Sub(old, top));
    hn::Store(factor, d, carry + v);
    hn::Store(top, d, highest + v);
    hn::Store(hn::MulAdd(hn::Load(d, totals + v), factor, hn::Add(even, odd)), d, totals + v);
  }
}

HWY_NOINLINE void GroupItem(void* data, size_t item, void* own) {
  const GroupJob& job = *static_cast<const GroupJob*>(data);
  const Packed& in = job.in;
  const D d;
  const size_t group = item % job.groups, head = item / job.groups % in.heads, batch = item / job.groups / in.heads;
  const size_t begin = group * kGroupTiles * kQueries, queries = std::min(in.tokens - begin, kGroupTiles * kQueries);
  const size_t tiles = (queries + kQueries - 1) / kQueries, stride = 2 * job.words;
  const float* first = in.Queries(batch, head) + begin * in.Row();
  GroupWork work;
  LayOut(job, own, &work);
  std::memset(work.qt, 0, tiles * job.words * kQueries * sizeof(uint32_t));
  std::memset(work.sums, 0, tiles * kQueries * stride * sizeof(float));
  std::memset(work.totals, 0, tiles * kQueries * sizeof(float));
  std::fill(work.highest, work.highest + tiles * kQueries, kLowest);
  for (size_t t = 0; t < tiles; ++t) {
    const float* rows[kQueries];
    QueryRows(first + t * kQueries * in.Row(), in.Row(), std::min(kQueries, queries - t * kQueries), rows);
    Transpose16(rows, in.width, in.scale * kLog2e, work.turned);
    PairRows(work.turned, in.width, work.qt + t * job.words * kQueries);
  }
  for (size_t start = 0; start < in.tokens; start += kGroupKeys) {
    const size_t count = std::min(kGroupKeys, in.tokens - start);
    PackChunk(job, batch, head, start, count, work);
    for (size_t t = 0; t < tiles; ++t) {
      ScoresOfWords(work.qt + t * job.words * kQueries, work.keys, job.words, count, work.scores);
      for (size_t j = 0; job.bias != nullptr && j < count; ++j) {
        const V bias = hn::Set(d, job.bias[batch * in.tokens + start + j]);
        for (size_t v = 0; v < kQueries; v += kLanes) {
          hn::Store(hn::Add(hn::Load(d, work.scores + j * kQueries + v), bias), d, work.scores + j * kQueries + v);
        }
      }
      HWY_ALIGN float carry[kQueries];
      WeighChunk(count, work.scores, work.highest + t * kQueries, work.totals + t * kQueries, carry);
      PairRows(work.scores, count, work.weights);
      float* sums = work.sums + t * kQueries * stride;
      SumWords<true>(work.weights, work.values, (count + 1) / 2, stride, sums, carry, nullptr, kQueries, stride, sums,
                     stride);
    }
  }
  for (size_t i = 0; i < queries; ++i) {
    const float share = 1.0f / work.totals[i];
    float* to = job.output + ((batch * in.tokens + begin + i) * in.heads + head) * in.width;
    for (size_t c = 0; c < in.width; ++c) to[c] = share * work.sums[i * stride + c];
  }
}

bool DenseAttentionTarget(const Packed& in, float* output, const Parallel& parallel) {
  if (in.batch == 0) return true;
  const size_t per_group = kGroupTiles * kQueries;
  GroupJob job{in, output, (in.tokens + per_group - 1) / per_group, PackedWords(in.width), nullptr};
  if (in.sizes != nullptr) {
    auto* bias = static_cast<float*>(parallel.Shared(Times(Times(in.batch, in.tokens), sizeof(float))));
    if (bias == nullptr) return false;
    LogSizes(in.sizes, in.batch * in.tokens, bias);
    job.bias = bias;
  }
  GroupWork work;
  return parallel.For(in.batch * in.heads * job.groups, LayOut(job, nullptr, &work), GroupItem, &job);
}

#endif  // a target with bfloat16
}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

bool SparseAttentionBf16(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                         const Parallel& parallel) {
#if HWY_TARGETS & HWY_AVX3_ZEN4
  if (Target() == HWY_AVX3_ZEN4) return N_AVX3_ZEN4::SparseAttentionTarget(in, indices, settings, output, parallel);
#endif
#if HWY_TARGETS & HWY_NEON_BF16
  if (Target() == HWY_NEON_BF16) return N_NEON_BF16::SparseAttentionTarget(in, indices, settings, output, parallel);
#endif
  return SparseAttention(in, indices, settings, output, parallel);
}

bool DenseAttentionBf16(const Packed& in, float* output, const Parallel& parallel) {
#if HWY_TARGETS & HWY_AVX3_ZEN4
  if (Target() == HWY_AVX3_ZEN4) return N_AVX3_ZEN4::DenseAttentionTarget(in, output, parallel);
#endif
#if HWY_TARGETS & HWY_NEON_BF16
  if (Target() == HWY_NEON_BF16) return N_NEON_BF16::DenseAttentionTarget(in, output, parallel);
#endif
  return DenseAttention(in, output, parallel);
}

}  // namespace sparsifiner
#endif

// SparseAttention and DenseAttention in bfloat16, where the instruction set has its dot product, or matrix tiles
// (amx-inl.h): queries, keys, values and weights are rounded, sums and softmax are float32. Rows of prefix tokens stay
// float32 (sparse-tile-inl.h). Where what is listed of a cell far outweighs the rest, and yet the rest attracts more, the
// cell's rounded weight errs by as many times more: selection lists what attracts.

// Built for those sets alone (and the floor, which is empty); in float32 they gain nothing over their lesser ones.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS                                                                             \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_AVX3_DL | HWY_AVX3_SPR | HWY_NEON | HWY_ALL_SVE)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bf16.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "amx-inl.h"
#include "bf16-inl.h"
#include "dense-inl.h"
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
  float *turned, *rests, *summed;
  uint32_t *qt, *keys, *values, *weights;
};

HWY_INLINE size_t LayOut(const WordsJob& job, void* base, WordsWork* work) {
  const SparseJob& sparse = job.sparse;
  const size_t rows = sparse.settings.prefix_keys + sparse.settings.keys + sparse.cells, pairs = PaddedPairs(rows);
  Layout layout(base);
  work->turned = layout.Take<float>(sparse.in.width, kQueries);
  work->rests = layout.Take<float>(sparse.cells + kPaddedRows, kQueries);
  work->summed = layout.Take<float>(kQueries, 2 * job.words);
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
template <class Products, bool kSized>
HWY_NOINLINE void AttendWords(const WordsJob& job, size_t batch, size_t head, size_t begin, size_t valid,
                              const List& list, bool fresh, const WordsWork& work) {
  const SparseJob& sparse = job.sparse;
  const Packed& in = sparse.in;
  const SparseSettings& s = sparse.settings;
  const size_t count = list.count, rows = count + sparse.cells, batch_head = batch * in.heads + head;
  const float* query_rows[kQueries];
  QueryRows(in.Queries(batch, head) + begin * in.Row(), in.Row(), valid, query_rows);
  PackTurned(query_rows, in.width, in.scale * kLog2e, work.turned, work.qt);
  if (fresh) {
    PlaceList(sparse, batch, list, work);
    GatherWords(job, batch_head, count, work);
  }
  Products::Scores(work.qt, work.keys, job.words, rows, work.scores);
  float* cells = work.scores + count * kQueries;
  if (sparse.cells != 0) {
    Products::Scores(work.qt, job.cell_rests + batch_head * sparse.cells * job.words, job.words, sparse.cells, work.rests);
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
  Products::Sums(work.weights, work.values, (rows + 1) / 2, 2 * job.words, work.summed, shares, valid, in.width,
                 sparse.output + ((batch * in.tokens + begin) * in.heads + head) * in.width, in.heads * in.width);
}

template <class Products>
HWY_NOINLINE void WordsItem(void* data, size_t item, void* own) {
  const WordsJob& job = *static_cast<const WordsJob*>(data);
  WordsWork work;
  LayOut(job, own, &work);
  [[maybe_unused]] const typename Products::Session session;
  const auto tile = [&](size_t batch, size_t head, size_t begin, size_t valid, const List& list, bool fresh) {
    const auto attend = job.sparse.bias == nullptr ? AttendWords<Products, false> : AttendWords<Products, true>;
    attend(job, batch, head, begin, valid, list, fresh, work);
  };
  RunUnit(job.sparse, item, work, tile);
}

template <class Products>
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
  return parallel.For(heads * (sparse.tiles + settings.prefix), LayOut(job, nullptr, &work), WordsItem<Products>, &job);
}

// ---------------------------------------------------------------------------------------------------------------------
// DenseAttention (dense-inl.h): values of two rows together.

template <class Products>
struct WordsKind {
  using Word = uint32_t;
  using Session = typename Products::Session;

  static size_t RowWords(size_t width) { return PackedWords(width); }
  static size_t Stride(size_t width) { return 2 * PackedWords(width); }

  static void PackQueries(const float* const* rows, size_t width, float factor, float* turned, uint32_t* qt) {
    PackTurned(rows, width, factor, turned, qt);
  }

  static void PackChunk(const float* keys, const float* values, size_t row, size_t width, size_t count,
                        const GroupWork<uint32_t>& work) {
    const size_t words = PackedWords(width);
    for (size_t j = 0; j < count; ++j) {
      const size_t ahead = std::min(j + kRowsAhead, count - 1) * row;
      FetchRow(keys + ahead, width);
      FetchRow(values + ahead, width);
      PackWords(keys + j * row, width, words, work.keys + j * words);
    }
    for (size_t j = 0; j < count; j += 2) {
      // Of an odd number the last counts with a weight of 0 for the row that is not there.
      PackPair(values + j * row, values + std::min(j + 1, count - 1) * row, width, words, work.values + j * words);
    }
  }

  static void Scores(const uint32_t* qt, const uint32_t* keys, size_t width, size_t count, float* scores) {
    Products::Scores(qt, keys, PackedWords(width), count, scores);
  }

  static void KeepWeights(V a, V b, size_t j, size_t v, const GroupWork<uint32_t>& work) {
    hn::Store(Pair(a, b), Words(), work.weights + j / 2 * kQueries + v);
  }

  static void AddSums(const GroupWork<uint32_t>& work, size_t count, size_t stride, const float* carry, float* sums) {
    Products::AddSums(work.weights, work.values, (count + 1) / 2, stride, carry, sums);
  }
};

template <class Products>
bool DenseAttentionTarget(const Packed& in, float* output, const Parallel& parallel) {
  return AttendDensely<WordsKind<Products>>(in, output, parallel);
}

#endif  // a target with bfloat16
}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

// As built for the target, where that has bfloat16: returns from the function around it.
#if HWY_TARGETS & HWY_AVX3_ZEN4
#define SPARSIFINER_RUN(function, ...)                                                                       \
  using namespace N_AVX3_ZEN4;                                                                               \
  if (Target() == kAmx) return function<TileProducts>(__VA_ARGS__);                                          \
  if (Target() == HWY_AVX3_ZEN4) return function<DotProducts>(__VA_ARGS__)
#elif HWY_TARGETS & HWY_NEON_BF16
#define SPARSIFINER_RUN(function, ...)                                                                       \
  using namespace N_NEON_BF16;                                                                               \
  if (Target() == HWY_NEON_BF16) return function<DotProducts>(__VA_ARGS__)
#else
#define SPARSIFINER_RUN(function, ...)
#endif

bool SparseAttentionBf16(const Packed& in, const int32_t* indices, const SparseSettings& settings, float* output,
                         const Parallel& parallel) {
  SPARSIFINER_RUN(SparseAttentionTarget, in, indices, settings, output, parallel);
  return SparseAttention(in, indices, settings, output, parallel);
}

bool DenseAttentionBf16(const Packed& in, float* output, const Parallel& parallel) {
  SPARSIFINER_RUN(DenseAttentionTarget, in, output, parallel);
  return DenseAttention(in, output, parallel);
}

}  // namespace sparsifiner
#endif

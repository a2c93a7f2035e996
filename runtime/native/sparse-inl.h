// SparseAttention (ops/schema.py) in any kind of arithmetic (kernels-inl.h).
//
// Each tile of queries attends to the prefix tokens, to its listed keys, and to background tokens (pools-inl.h), which
// represent the patches that it did not list. All keys and values of a tile are rows of one table. Prefix queries, and
// queries with a list of their own, are computed in float32.

#if defined(SPARSIFINER_SPARSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_SPARSE_INL_H_
#undef SPARSIFINER_SPARSE_INL_H_
#else
#define SPARSIFINER_SPARSE_INL_H_
#endif

#include "pools-inl.h"
#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// Number of tokens from which the keys and values of each head are packed first. In qkv, the rows of a head are far
// apart, most of them on different memory pages, and every tile reads the rows of its list again. For fewer tokens,
// packing takes longer than it saves.
constexpr size_t kPackFrom = 2048;

template <class Word>
struct TableJob : SparseJob {
  size_t words;           // words in a packed row
  size_t packed;          // packed tokens of a head; 0: float32 rows are read from qkv
  size_t rows;            // rows of a head: the packed tokens, followed by the means of the pools
  Word *keys, *values;    // [batch * heads][rows][words]
  Word* rests;            // [batch * heads][pools][words]: part of the mean keys that rounding removes
};

// Working memory for one tile.
template <class Word>
struct TableWork : ListWork {
  float *turned, *rests, *summed;
  Word *qt, *keys, *values, *weights;  // float32: keys of one block, and no values
};

// Number of values that are accumulated at a time when they are not gathered. They fit the first-level cache, so that
// all passes over them are fast.
constexpr size_t kChunk = 64;

template <class Kind, class Word = typename Kind::Word>
HWY_INLINE size_t LayOut(const TableJob<Word>& job, void* base, TableWork<Word>* work) {
  const size_t rows = job.settings.prefix_keys + job.settings.keys + job.pools, stride = Kind::Stride(job.in.width);
  Layout layout(base);
  work->turned = layout.Take<float>(job.in.width, kQueries);
  work->rests = layout.Take<float>(job.pools + kPaddedRows, kQueries);
  work->summed = layout.Take<float>(kQueries, stride);
  work->qt = layout.Take<Word>(job.words, kQueries);
  work->keys = layout.Take<Word>((Kind::kRounds ? rows : 0) + kPaddedRows, job.words);
  work->values = layout.Take<Word>(Kind::kRounds ? RoundUp(Groups(rows, Kind::kRows), kPaddedRows) : 0, stride);
  TakeList(job, &layout, work);
  work->weights = Kind::TakeWeights(&layout, rows, work->scores);
  return layout.used();
}

// Returns the keys (part 1) or values (part 2) of a head. Tokens are job.row words apart.
template <class Word>
HWY_INLINE const Word* TokensOf(const TableJob<Word>& job, size_t head, size_t part) {
  if constexpr (std::is_same_v<Word, float>) {
    if (job.packed == 0) return job.in.Rows(head, part);
  }
  return (part == 1 ? job.keys : job.values) + head * job.rows * job.words;
}

// Prepares one run of a head's keys or values: packs them if job.packed, and computes their mean if there are pools.
// base: scratch [stride].
template <class Kind, class Word = typename Kind::Word>
HWY_NOINLINE void PrepareRun(void* data, size_t item, void* base) {
  const auto& job = *static_cast<const TableJob<Word>*>(data);
  const Packed& in = job.in;
  const size_t run = item % job.runs, part = 1 + item / job.runs % 2, head = item / job.runs / 2;
  const size_t begin = job.settings.prefix + run * job.run, end = std::min(begin + job.run, in.tokens);
  const float* from = in.Rows(head, part);
  Word* rows = (part == 1 ? job.keys : job.values) + head * job.rows * job.words;
  for (size_t j = run ? begin : 0; job.packed != 0 && j < end; ++j) {
    FetchRow(from + std::min(j + kRowsAhead, end - 1) * in.Row(), in.width);
    Kind::PackRow(from + j * in.Row(), in.width, rows + j * job.words);
  }
  if (job.pools == 0) return;
  const float* sizes = in.sizes == nullptr ? nullptr : in.sizes + head / in.heads * in.tokens + begin;
  Word* rest = Kind::kRounds && part == 1 ? job.rests + (head * job.pools + run) * job.words : nullptr;
  Kind::PoolMean(TokensOf(job, head, part) + begin * job.row, job.row, sizes, end - begin, in.width,
                 static_cast<float*>(base), rows + (job.packed + run) * job.words, rest);
}

// Gathers the rows of a list, followed by the background tokens. Keys are copied, values are joined in groups of kRows.
// If the number of rows is odd, the last one fills the missing row, whose weight is 0.
template <class Kind, class Word = typename Kind::Word>
HWY_INLINE void GatherTable(const TableJob<Word>& job, size_t head, size_t rows, const TableWork<Word>& work) {
  const Word *keys = TokensOf(job, head, 1), *values = TokensOf(job, head, 2);
  const uint32_t* HWY_RESTRICT places = work.places;
  const size_t words = job.words;
  const hn::Rebind<Word, D> d;
  for (size_t j = 0; j < rows; ++j) {
    FetchRow(keys + places[j + kRowsAhead], words);
    FetchRow(values + places[j], words);
    for (size_t w = 0; w < words; w += kLanes) {
      hn::Store(hn::Load(d, keys + places[j] + w), d, work.keys + j * words + w);
    }
  }
  for (size_t j = 0; j < rows; j += Kind::kRows) {
    const size_t last = std::min(j + Kind::kRows, rows) - 1;
    Kind::JoinValues(values + places[j], values + places[last], words, work.values + j * words);
  }
}

// Computes the logits of a gathered table, work.scores [rows][16]. `pools` points to the last rows, those of the
// background tokens.
template <class Kind, class Word = typename Kind::Word>
HWY_INLINE void ScoreTable(const TableJob<Word>& job, size_t head, size_t rows, const TableWork<Word>& work,
                           float* HWY_RESTRICT pools) {
  Kind::Scores(work.qt, work.keys, job.in.width, rows, work.scores);
  if (job.pools == 0) return;
  Kind::Scores(work.qt, job.rests + head * job.pools * job.words, job.in.width, job.pools, work.rests);
  for (size_t i = 0; i < job.pools * kQueries; i += kLanes) {
    hn::Store(hn::Add(hn::Load(D(), pools + i), hn::Load(D(), work.rests + i)), D(), pools + i);
  }
}

// ScoreTable for float32 rows that are not gathered in advance: gathers one block of the list at a time while the next
// one is prefetched.
HWY_INLINE void ScoreFloats(const TableJob<float>& job, size_t head, size_t count, const TableWork<float>& work,
                            float* pools) {
  const float *keys = TokensOf(job, head, 1), *means = job.keys + (head * job.rows + job.packed) * job.words;
  const size_t width = job.in.width, stride = job.words;
  const auto gather = [&](size_t j, size_t some, size_t columns) {
    for (size_t i = 0; i < some; ++i) Floats::PackRow(keys + work.places[j + i], columns, work.keys + i * stride);
  };
  size_t j = 0;
  for (; width == 64 && j + kKeyBlock <= count; j += kKeyBlock) {
    gather(j, kKeyBlock, 64);
    ScoreBlock<Floats, kKeyBlock, true>(work.qt, work.keys, 64, 64, work.scores + j * kQueries, kQueries, keys,
                                        work.places + j + kKeyBlock);
  }
  for (; j < count; j += kKeyBlock) {
    const size_t some = std::min(kKeyBlock, count - j);
    gather(j, some, width);
    Scores<Floats, true>(work.qt, work.keys, stride, width, some, work.scores + j * kQueries);
  }
  if (job.pools != 0) Scores<Floats, true>(work.qt, means, stride, width, job.pools, pools);
}

// Computes output = factor * (weights x values) over the list and the background tokens, one chunk of the list at a
// time.
HWY_INLINE void SumFloats(const TableJob<float>& job, size_t head, size_t count, const TableWork<float>& work,
                          const float* factor, size_t valid, const Output& output) {
  const size_t width = job.in.width, stride = job.words, chunk = Groups(count, Groups(count, kChunk));
  HWY_ALIGN float ones[kQueries];
  std::fill(ones, ones + kQueries, 1.0f);
  Weighted<float> sums{work.scores, TokensOf(job, head, 2), chunk, stride, work.places, work.summed, ones, nullptr,
                       {work.summed, false}, kQueries, stride, stride};
  Weighted<float> pools{};
  pools.weights = work.scores + count * kQueries, pools.count = job.pools;
  pools.values = job.values + (head * job.rows + job.packed) * stride;
  for (size_t start = 0; start < count; start += chunk, sums.weights += chunk * kQueries, sums.places += chunk) {
    if (start + chunk >= count) {
      sums.count = count - start, sums.more = &pools, sums.factor = factor;
      sums.output = output, sums.valid = valid, sums.width = width, sums.out_stride = job.in.heads * width;
    }
    start == 0 ? Accumulate<Floats, false>(sums) : Accumulate<Floats, true>(sums);
  }
}

// Computes the attention of up to 16 queries [begin, begin + valid) of a tile, after PlaceList and, if Kind rounds,
// GatherTable.
template <class Kind, bool kSized, class Word = typename Kind::Word>
HWY_NOINLINE void AttendTile(const TableJob<Word>& job, size_t head, size_t begin, size_t valid,
                             const TableWork<Word>& work) {
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t count = s.prefix_keys + s.keys, rows = count + job.pools, batch = head / in.heads;
  const float* query_rows[kQueries];
  QueryRows(in.Rows(head, 0) + begin * in.Row(), in.Row(), valid, query_rows);
  Kind::PackQueries(query_rows, in.width, in.scale * kLog2e, work.turned, work.qt);
  float* pools = work.scores + count * kQueries;
  if constexpr (Kind::kRounds) {
    ScoreTable<Kind>(job, head, rows, work, pools);
  } else {
    ScoreFloats(job, head, count, work, pools);
  }
  if (job.pools != 0) {
    RestOfPools<kSized>(job, work.owner, s.keys, work.scores + s.prefix_keys * kQueries, work.counts, work.sums, pools);
  }
  if (kSized) {
    AddBias(job.bias + batch * in.tokens, work.places, static_cast<uint32_t>(job.row), count, work.scores);
  }
  HWY_ALIGN float shares[kQueries];
  WeighTile<kSized>(job, count, work.owner, work.counts, work.scores, pools, work.sums, shares);
  const Output output = job.output.From(((batch * in.tokens + begin) * in.heads + head % in.heads) * in.width);
  if constexpr (Kind::kRounds) {
    Kind::PairRows(work.scores, rows, work.weights);
    Kind::Sums(work.weights, work.values, Groups(rows, Kind::kRows), Kind::Stride(in.width), work.summed, shares, valid,
               in.width, output, in.heads * in.width);
  } else {
    SumFloats(job, head, count, work, shares, valid, output);
  }
}

// Computes one unit of a head: a prefix token, a patch with a list of its own, or a tile.
template <class Kind, class Word = typename Kind::Word>
HWY_NOINLINE void SparseItem(void* data, size_t item, void* base) {
  const auto& job = *static_cast<const TableJob<Word>*>(data);
  const Packed& in = job.in;
  const SparseSettings& s = job.settings;
  const size_t units = job.tiles + s.prefix, unit = item % units, head = item / units;
  const size_t batch = head / in.heads, count = s.prefix_keys + s.keys;
  const bool prefix_row = unit >= job.tiles;
  const List list{prefix_row ? nullptr : job.indices + (head * job.tiles + unit) * s.keys, s.prefix_keys, count,
                  in.tokens - s.prefix_keys};
  TableWork<Word> work;
  LayOut<Kind>(job, base, &work);
  if (prefix_row || (s.tile == 1 && job.pools == 0)) {
    const size_t token = prefix_row ? unit - job.tiles : s.prefix + unit;
    const float *keys = in.Rows(head, 1), *values = in.Rows(head, 2);
    size_t row = in.Row();
    if constexpr (!Kind::kRounds) {
      keys = TokensOf(job, head, 1), values = TokensOf(job, head, 2), row = job.row;
    }
    AttendOne(in.Rows(head, 0) + token * in.Row(), keys, values, row, prefix_row ? nullptr : &list,
              prefix_row ? in.tokens : count, in.scale, in.width,
              job.bias == nullptr ? nullptr : job.bias + batch * in.tokens, work.scores,
              job.output.From(((batch * in.tokens + token) * in.heads + head % in.heads) * in.width));
    return;
  }
  [[maybe_unused]] const typename Kind::Session session;
  PlaceList(job, batch, list, Kind::kRounds ? job.pools : 0, work);
  if constexpr (Kind::kRounds) GatherTable<Kind>(job, head, count + job.pools, work);
  const size_t begin = s.prefix + unit * s.tile, end = std::min(begin + s.tile, in.tokens);
  const auto attend = job.bias == nullptr ? AttendTile<Kind, false> : AttendTile<Kind, true>;
  for (size_t some = begin; some < end; some += kQueries) {
    attend(job, head, some, std::min(kQueries, end - some), work);
  }
}

template <class Kind, class Word = typename Kind::Word>
bool AttendSparsely(const Packed& in, const int32_t* indices, const SparseSettings& settings, const Output& output,
                    const Call& call) {
  if (in.batch == 0) return true;
  TableJob<Word> job{};
  static_cast<SparseJob&>(job) = Describe(in, indices, settings, output);
  job.words = Kind::RowWords(in.width);
  const size_t heads = in.batch * in.heads;
  const bool pack = Kind::kRounds || in.tokens >= kPackFrom || in.width != job.words;
  job.packed = pack ? in.tokens : 0;
  job.rows = job.packed + job.pools;
  job.row = pack ? job.words : in.Row();
  const bool shared = call.Share([&](Layout* layout) {
    job.keys = layout->Take<Word>(Plus(Times(heads, job.rows), kPaddedRows), job.words);
    job.values = layout->Take<Word>(heads, job.rows, job.words);
    job.rests = layout->Take<Word>(Kind::kRounds ? heads * job.pools + kPaddedRows : 0, job.words);
    TakeTables(layout, &job);
  });
  if (!shared) return false;
  FillTables(job);
  const size_t sum = Times(Kind::Stride(in.width), sizeof(float));
  if ((pack || job.pools != 0) && !call.For(heads * 2 * job.runs, sum, PrepareRun<Kind>, &job)) return false;
  TableWork<Word> work;
  return call.For(heads * (job.tiles + settings.prefix), LayOut<Kind>(job, nullptr, &work), SparseItem<Kind>, &job);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

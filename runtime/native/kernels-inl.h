// Building blocks of the kernels, compiled once per instruction set (Highway's foreach_target).
//
// Attention is computed for 16 queries at a time, one query per lane. A row of scores holds the scores of one key for
// 16 queries, so softmax needs no reduction across lanes, and keys are read in memory order:
//
//   queries [16][d] --Transpose16--> qt [d][16]
//   keys    [rows][d] (packed)  --Scores-->  scores [rows][16]      one broadcast of a key's channel per FMA
//   scores  --Exp2-->  weights [rows][16]
//   values  [rows][d] (packed)  --Accumulate-->  output [16][d]     weights broadcast, lanes are channels
//
// All logits are base-2 logarithms: scale * log2(e) is folded into the queries, and softmax uses 2^x.

#if defined(SPARSIFINER_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_KERNELS_INL_H_
#undef SPARSIFINER_KERNELS_INL_H_
#else
#define SPARSIFINER_KERNELS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels.h"
#include "scratch.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kQueries = 16;  // queries that are computed together
using D = hn::CappedTag<float, kQueries>;
using V = hn::Vec<D>;
constexpr size_t kLanes = hn::MaxLanes(D());
constexpr size_t kVectors = kQueries / kLanes;  // vectors that hold 16 queries
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Block sizes of the inner loops, chosen to fit the vector registers.
constexpr size_t kKeyBlock = kLanes == 16 ? 16 : 4;  // keys scored at a time
constexpr size_t kQueryBlock = kLanes == 8 ? 4 : 8;  // queries accumulated at a time
constexpr size_t kChannelBlock = 2;                  // vectors of channels accumulated at a time
constexpr size_t kPaddedRows = 16;                   // extra rows in buffers, for rounded-up loops

HWY_INLINE size_t RoundUp(size_t n, size_t step) { return Groups(n, step) * step; }

// Returns the number of floats in a packed row: whole vectors, so that no kernel needs a remainder loop.
HWY_INLINE size_t PackedWidth(size_t width) { return RoundUp(width, kLanes); }

// Returns 2^x for x <= 0 (clamped at -126), with a relative error below 1e-7. Adding 1.5 * 2^23 rounds x to an integer
// in the low bits.
HWY_INLINE V Exp2(V x) {
  const D d;
  const hn::RebindToSigned<D> di;
  const V magic = hn::Set(d, 12582912.0f);
  x = hn::Max(x, hn::Set(d, -126.0f));
  const V shifted = hn::Add(x, magic);
  const V f = hn::Sub(x, hn::Sub(shifted, magic));
  V p = hn::Set(d, 1.32764748e-3f);
  p = hn::MulAdd(p, f, hn::Set(d, 9.67554252e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.55071302e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.40221203e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.93146967e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.00000007f));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

// Returns a vector of 4-channel blocks: lanes 4m..4m+3 hold channels k..k+3 of row 4m + i.
template <size_t kBlocks>
HWY_INLINE auto LoadBlocks(const float* const* rows, size_t i, size_t k) {
  const hn::CappedTag<float, 4 * kBlocks> d;
  if constexpr (kBlocks == 1) {
    return hn::LoadU(d, rows[i] + k);
  } else {
    const auto low = LoadBlocks<kBlocks / 2>(rows, i, k);
    const auto high = LoadBlocks<kBlocks / 2>(rows + 2 * kBlocks, i, k);
    return hn::Combine(d, high, low);
  }
}

// Transposes 16 rows of `width` floats into out [width][16], multiplied by `factor`.
HWY_INLINE void Transpose16(const float* const* rows, size_t width, float factor, float* HWY_RESTRICT out) {
  const D d;
  const V f = hn::Set(d, factor);
#if HWY_TARGET != HWY_SCALAR
  const hn::Repartition<uint64_t, D> d64;
  const size_t whole = width / 4 * 4;
  for (size_t k = 0; k < whole; k += 4) {
    for (size_t v = 0; v < kVectors; ++v) {
      const float* const* some = rows + v * kLanes;
      const V a0 = LoadBlocks<kLanes / 4>(some, 0, k), a1 = LoadBlocks<kLanes / 4>(some, 1, k);
      const V a2 = LoadBlocks<kLanes / 4>(some, 2, k), a3 = LoadBlocks<kLanes / 4>(some, 3, k);
      const auto lo0 = hn::BitCast(d64, hn::InterleaveLower(d, a0, a1));
      const auto lo1 = hn::BitCast(d64, hn::InterleaveLower(d, a2, a3));
      const auto hi0 = hn::BitCast(d64, hn::InterleaveUpper(d, a0, a1));
      const auto hi1 = hn::BitCast(d64, hn::InterleaveUpper(d, a2, a3));
      float* to = out + k * kQueries + v * kLanes;
      hn::Store(hn::Mul(f, hn::BitCast(d, hn::InterleaveLower(d64, lo0, lo1))), d, to);
      hn::Store(hn::Mul(f, hn::BitCast(d, hn::InterleaveUpper(d64, lo0, lo1))), d, to + kQueries);
      hn::Store(hn::Mul(f, hn::BitCast(d, hn::InterleaveLower(d64, hi0, hi1))), d, to + 2 * kQueries);
      hn::Store(hn::Mul(f, hn::BitCast(d, hn::InterleaveUpper(d64, hi0, hi1))), d, to + 3 * kQueries);
    }
  }
#else
  const size_t whole = 0;
#endif
  for (size_t k = whole; k < width; ++k) {
    for (size_t i = 0; i < kQueries; ++i) out[k * kQueries + i] = factor * rows[i][k];
  }
}

// Sets 16 pointers to rows of queries. Missing rows repeat the first one; their results are not stored.
HWY_INLINE void QueryRows(const float* first, size_t row, size_t valid, const float** rows) {
  for (size_t i = 0; i < kQueries; ++i) rows[i] = first + (i < valid ? i : 0) * row;
}

// scores[j * out_stride + i] = keys[j] . query i for kKeys packed rows, `stride` words apart, of which the first
// `words` are used. kFetch: meanwhile prefetch the rows at base + ahead[j], which are gathered next, one cache line at
// a time.
template <class Kind, size_t kKeys, bool kFetch = false, class Word = typename Kind::Word>
HWY_INLINE void ScoreBlock(const Word* HWY_RESTRICT qt, const Word* HWY_RESTRICT keys, size_t stride, size_t words,
                           float* HWY_RESTRICT scores, size_t out_stride, const Word* base = nullptr,
                           const uint32_t* ahead = nullptr) {
  const D d;
  const hn::Rebind<Word, D> dw;
  V sum[kKeys][kVectors];
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sum[j][v] = hn::Zero(d);
  }
  for (size_t k = 0; k < words; ++k) {
    if constexpr (kFetch) hwy::Prefetch(base + ahead[k * kKeys / 64] + k % 4 * 16);
    hn::Vec<decltype(dw)> q[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) q[v] = hn::Load(dw, qt + k * kQueries + v * kLanes);
#pragma GCC unroll 16
    for (size_t j = 0; j < kKeys; ++j) {
      const auto key = hn::Set(dw, keys[j * stride + k]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) sum[j][v] = Kind::AddProduct(key, q[v], sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) hn::Store(sum[j][v], d, scores + j * out_stride + v * kLanes);
  }
}

// ScoreBlock for any number of rows. A constant stride lets the compiler use address displacements instead of pointers.
// kPadded: rows up to the next multiple of 4 may be read, and their scores written. This is faster, since a single row
// leaves most registers unused.
template <class Kind, size_t kStride, bool kPadded, class Word>
HWY_INLINE void ScoreRows(const Word* HWY_RESTRICT qt, const Word* HWY_RESTRICT keys, size_t stride, size_t words,
                          size_t rows, float* HWY_RESTRICT scores, size_t out_stride) {
  if constexpr (kStride != 0) stride = kStride;
  if constexpr (kPadded) rows = RoundUp(rows, 4);
  size_t j = 0;
  const auto block = [&](auto size) {
    constexpr size_t kSize = decltype(size)::value;
    ScoreBlock<Kind, kSize>(qt, keys + j * stride, stride, words, scores + j * out_stride, out_stride);
    j += kSize;
  };
  while (j + kKeyBlock <= rows) block(std::integral_constant<size_t, kKeyBlock>());
  if (kKeyBlock > 12 && j + 12 <= rows) block(std::integral_constant<size_t, 12>());
  if (kKeyBlock > 8 && j + 8 <= rows) block(std::integral_constant<size_t, 8>());
  if (kKeyBlock > 4 && j + 4 <= rows) block(std::integral_constant<size_t, 4>());
  while (j < rows) block(std::integral_constant<size_t, 1>());
}

// ScoreRows with the common strides as constants.
template <class Kind, bool kPadded, class Word = typename Kind::Word>
HWY_NOINLINE void Scores(const Word* qt, const Word* keys, size_t stride, size_t words, size_t rows, float* scores,
                         size_t out_stride = kQueries) {
  switch (stride) {
    case 16:
      return ScoreRows<Kind, 16, kPadded>(qt, keys, stride, words, rows, scores, out_stride);
    case 32:
      return ScoreRows<Kind, 32, kPadded>(qt, keys, stride, words, rows, scores, out_stride);
    case 64:
      return ScoreRows<Kind, 64, kPadded>(qt, keys, stride, words, rows, scores, out_stride);
    default:
      return ScoreRows<Kind, 0, kPadded>(qt, keys, stride, words, rows, scores, out_stride);
  }
}

// Stores the first `some` floats of a vector (all if `some` is larger), rounded if the output is bfloat16.
HWY_INLINE void Put(V numbers, size_t some, const Output& to) {
  const D d;
  const hn::Rebind<hwy::bfloat16_t, D> halves;
  if (to.rounded) return hn::StoreN(hn::DemoteTo(halves, numbers), halves, static_cast<hwy::bfloat16_t*>(to.data), some);
  auto* exact = static_cast<float*>(to.data);
  some >= kLanes ? hn::StoreU(numbers, d, exact) : hn::StoreN(numbers, d, exact, some);
}

constexpr size_t kRowsAhead = 8;  // prefetch distance in rows

// Weighted sum of values for 16 queries. Row i of the output, of `width` elements, is
// factor[i] * (carry[i] * before[i] + sum over j of weights[j][i] * values[j]); a null factor counts as 1.
template <class Word>
struct Weighted {
  const Word* weights;  // [count][16]
  const Word* values;   // [count][stride], or rows at `places`
  size_t count, stride;
  const uint32_t* places;       // [count + kRowsAhead]: offset of each row from `values` in words, or null
  const float *before, *carry;  // [16][stride], [16]
  const float* factor;          // [16]
  Output output;
  size_t valid, width, out_stride;  // rows stored, elements stored of each row, and distance between rows
  const Weighted* more = nullptr;   // further weights and contiguous values, or null
};

// Computes kQueryBlock rows and kColumns vectors of channels. kBefore: start from carry * before, else from 0.
template <class Kind, size_t kColumns, bool kBefore, class Word>
HWY_INLINE void AccumulateBlock(const Weighted<Word> sums, size_t query, size_t channel) {
  const D d;
  const hn::Rebind<Word, D> dw;
  const size_t stride = sums.stride, count = sums.count;
  V sum[kQueryBlock][kColumns];
#pragma GCC unroll 8
  for (size_t i = 0; i < kQueryBlock; ++i) {
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) {
      sum[i][c] = hn::Zero(d);
      if constexpr (kBefore) {
        sum[i][c] = hn::Load(d, sums.before + (query + i) * stride + channel + c * kLanes);
        sum[i][c] = hn::Mul(hn::Set(d, sums.carry[query + i]), sum[i][c]);
      }
    }
  }
  const auto add = [&](const Word* HWY_RESTRICT weights, const Word* HWY_RESTRICT row) {
    hn::Vec<decltype(dw)> value[kColumns];
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) value[c] = hn::LoadU(dw, row + c * kLanes);
#pragma GCC unroll 8
    for (size_t i = 0; i < kQueryBlock; ++i) {
      const auto weight = hn::Set(dw, weights[i]);
#pragma GCC unroll 2
      for (size_t c = 0; c < kColumns; ++c) sum[i][c] = Kind::AddProduct(weight, value[c], sum[i][c]);
    }
  };
  const Word* HWY_RESTRICT weights = sums.weights + query;
  const Word* HWY_RESTRICT values = sums.values + channel;
  const uint32_t* HWY_RESTRICT places = sums.places;
  if (places == nullptr) {
    for (size_t j = 0; j < count; ++j) add(weights + j * kQueries, values + j * stride);
  } else if (query == 0) {  // the first pass over these rows prefetches them
    for (size_t j = 0; j < count; ++j) {
      for (size_t c = 0; c < kColumns * kLanes; c += 16) hwy::Prefetch(values + places[j + kRowsAhead] + c);
      add(weights + j * kQueries, values + places[j]);
    }
  } else {
    for (size_t j = 0; j < count; ++j) add(weights + j * kQueries, values + places[j]);
  }
  const Weighted<Word>* more = sums.more;
  for (size_t j = 0; more != nullptr && j < more->count; ++j) {
    add(more->weights + j * kQueries + query, more->values + j * stride + channel);
  }
  for (size_t i = 0; i < kQueryBlock && query + i < sums.valid; ++i) {
    for (size_t c = 0; c < kColumns; ++c) {
      const size_t from = channel + c * kLanes;
      const V result = sums.factor == nullptr ? sum[i][c] : hn::Mul(hn::Set(d, sums.factor[query + i]), sum[i][c]);
      const Output to = sums.output.From((query + i) * sums.out_stride + from);
      if (from < sums.width) Put(result, sums.width - from, to);
    }
  }
}

// Computes all queries and channels.
template <class Kind, bool kBefore, class Word = typename Kind::Word>
HWY_NOINLINE void Accumulate(const Weighted<Word>& sums) {
  for (size_t query = 0; query < sums.valid; query += kQueryBlock) {
    size_t channel = 0;
    for (; channel + kChannelBlock * kLanes <= sums.stride; channel += kChannelBlock * kLanes) {
      AccumulateBlock<Kind, kChannelBlock, kBefore>(sums, query, channel);
    }
    if (channel < sums.stride) AccumulateBlock<Kind, 1, kBefore>(sums, query, channel);
  }
}

// Loads the first `some` floats (at least one) of a vector; the rest is 0.
HWY_INLINE V LoadSome(const float* from, size_t some) {
  const D d;
  return some < kLanes ? hn::LoadN(d, from, some) : hn::LoadU(d, from);
}

// Prefetches a row of `width` words into the first-level cache.
template <typename Word>
HWY_INLINE void FetchRow(const Word* row, size_t width) {
  for (size_t c = 0; c < width; c += 64 / sizeof(Word)) hwy::Prefetch(row + c);
}

// Computes the means of pools of `pool` consecutive rows of a head: rows [patches], `row` floats apart -> means
// [pools][stride]. sizes: weight of each row, or null for equal weights.
HWY_INLINE void PoolMeans(const float* rows, size_t row, const float* sizes, size_t patches, size_t pool, size_t width,
                          size_t stride, float* HWY_RESTRICT means) {
  const D d;
  for (size_t start = 0; start < patches; start += pool, means += stride) {
    const size_t end = std::min(start + pool, patches);
    float total = static_cast<float>(end - start);
    if (sizes != nullptr) {
      total = 0.0f;
      for (size_t j = start; j < end; ++j) total += sizes[j];
    }
    const V share = hn::Set(d, 1.0f / total);
    for (size_t c = 0; c < stride; c += kLanes) {
      V sum = hn::Zero(d);
      const size_t some = std::min(kLanes, width - c);
      for (size_t j = start; j < end; ++j) {
        const V x = LoadSome(rows + j * row + c, some);
        sum = sizes == nullptr ? hn::Add(sum, x) : hn::MulAdd(hn::Set(d, sizes[j]), x, sum);
      }
      hn::Store(hn::Mul(sum, share), d, means + c);
    }
  }
}

// Computes log2 of the sizes of `count` tokens, which is added to their logits.
HWY_INLINE void LogSizes(const float* sizes, size_t count, float* HWY_RESTRICT logs) {
  for (size_t i = 0; i < count; ++i) logs[i] = sizes[i] == 1.0f ? 0.0f : std::log2(sizes[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kinds of arithmetic: the template parameter `Kind` of all attention code, float32 here and bfloat16 in bf16-inl.h. A
// kind packs queries, keys, values and weights into words of four bytes. A word of a query or key holds kRows channels
// of one row; a word of a value or weight holds one channel of kRows rows:
//
//   qt      [words][16]            keys   [rows][words]
//   weights [rows / kRows][16]     values [rows / kRows][stride]
//
// Packed rows are padded with zeros to whole vectors, so that no kernel needs a remainder loop. Sums, softmax and the
// logits of background tokens are float32.

struct Floats {
  using Word = float;
  struct Session {};  // state of a thread while it uses this kind; see TileSession
  static constexpr size_t kRows = 1;
  // True for kinds that round: their rows are always packed, and sparse-inl.h gathers them in tables.
  static constexpr bool kRounds = false;

  // Returns sum + the product of two words: the sum of the products of their elements.
  static HWY_INLINE V AddProduct(V a, V b, V sum) { return hn::MulAdd(a, b, sum); }

  static size_t RowWords(size_t width) { return PackedWidth(width); }
  static size_t Stride(size_t width) { return PackedWidth(width); }

  // Packs 16 queries, multiplied by `factor`. turned: scratch [width][16].
  static void PackQueries(const float* const* rows, size_t width, float factor, float* /*turned*/, float* qt) {
    Transpose16(rows, width, factor, qt);
  }

  // Packs a row of keys.
  static void PackRow(const float* from, size_t width, float* to) {
    const D d;
    size_t c = 0;
    for (; c + kLanes <= width; c += kLanes) hn::Store(hn::LoadU(d, from + c), d, to + c);
    if (c < width) hn::Store(hn::LoadN(d, from + c, width - c), d, to + c);
  }

  // Computes scores[j][16] of packed keys. Rows up to the next multiple of 16 may be read, and their scores written.
  static void Scores(const float* qt, const float* keys, size_t width, size_t rows, float* scores) {
    HWY_NAMESPACE::Scores<Floats, true>(qt, keys, PackedWidth(width), width, rows, scores);
  }

  // Packs kRows rows of values into a row of words.
  static void PackValues(const float* low, const float* /*high*/, size_t width, float* to) { PackRow(low, width, to); }

  // Stores the weights of rows j (a) and j + 1 (b, 0 if there is none) for the queries from v on. The buffer has room
  // for one more row.
  static void KeepWeights(V a, V b, size_t j, size_t v, float* weights) {
    hn::Store(a, D(), weights + j * kQueries + v);
    hn::Store(b, D(), weights + (j + 1) * kQueries + v);
  }

  // Returns the buffer for the weights of `rows` rows; float32 weights replace the scores.
  static float* TakeWeights(Layout*, size_t /*rows*/, float* scores) { return scores; }

  // sums[i] = carry[i] * sums[i] + (sum over rows of weights * values). The buffers of weights and values have room for
  // a multiple of 16 rows, and their contents are unspecified afterwards.
  static void AddSums(float* weights, float* values, size_t count, size_t stride, const float* carry, float* sums) {
    Accumulate<Floats, true>(
        {weights, values, count, stride, nullptr, sums, carry, nullptr, {sums, false}, kQueries, stride, stride});
  }

  // Computes the mean of `count` rows, weighted by size (null: equal weights). scratch: [stride]. rest: the part of the
  // mean that rounding removes; null if not needed.
  static void PoolMean(const float* rows, size_t row, const float* sizes, size_t count, size_t width,
                       float* /*scratch*/, float* mean, float* /*rest*/) {
    PoolMeans(rows, row, sizes, count, count, width, Stride(width), mean);
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

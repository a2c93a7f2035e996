// Building blocks of attention in bfloat16, for instruction sets that have its dot product; compiled once for each.
//
// A word of 32 bits holds two bfloat16. One instruction multiplies a word's two with another word's two and adds both
// products to a float32 sum, so that half as many are needed as in float32:
//
//   qt      [d/2][16]     words of two channels      keys    [rows][d/2]   words of two channels
//   weights [rows/2][16]  words of two rows          values  [rows/2][d]   words of two rows
//
// Sums, softmax and what is left of the cells stay in float32. Rounding is to nearest even.

#if defined(SPARSIFINER_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_BF16_INL_H_
#undef SPARSIFINER_BF16_INL_H_
#else
#define SPARSIFINER_BF16_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
#if HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_NEON_BF16

using Words = hn::RebindToUnsigned<D>;
using W = hn::Vec<Words>;

// Words of a packed row: whole vectors.
HWY_INLINE size_t PackedWords(size_t width) { return RoundUp(width, 2 * kLanes) / 2; }

HWY_INLINE V Dot(W a, W b, V sum) {
  const hn::Repartition<hwy::bfloat16_t, D> halves;
  V unused = hn::Zero(D());
  return hn::ReorderWidenMulAccumulate(D(), hn::BitCast(halves, a), hn::BitCast(halves, b), sum, unused);
}

// Of a vector's halves: those of the lower and of the upper half in turn.
struct InTurn {
  constexpr InTurn() {
    for (size_t i = 0; i < 2 * kLanes; ++i) from[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
  }
  alignas(64) uint16_t from[2 * kLanes] = {};
};
constexpr InTurn kInTurn;

// Words of `low`, and of `high` in their upper halves.
HWY_INLINE W Pair(V low, V high) {
  const hn::Repartition<hwy::bfloat16_t, D> halves;
  const hn::Repartition<uint16_t, D> bits;
  const auto both = hn::BitCast(bits, hn::OrderedDemote2To(halves, low, high));
  return hn::BitCast(Words(), hn::TableLookupLanes(both, hn::SetTableIndices(bits, kInTurn.from)));
}

// out[k][16] = words of two rows of [rows][16] floats; the last of an odd number stands alone.
HWY_INLINE void PairRows(const float* HWY_RESTRICT from, size_t rows, uint32_t* HWY_RESTRICT out) {
  const D d;
  for (size_t k = 0; k < rows; k += 2, from += 2 * kQueries, out += kQueries) {
    for (size_t v = 0; v < kQueries; v += kLanes) {
      const V high = k + 1 < rows ? hn::Load(d, from + kQueries + v) : hn::Zero(d);
      hn::Store(Pair(hn::Load(d, from + v), high), Words(), out + v);
    }
  }
}

// One row of `width` floats to a packed row of words of two channels, the rest zero.
HWY_INLINE void PackWords(const float* HWY_RESTRICT from, size_t width, size_t words, uint32_t* HWY_RESTRICT to) {
  const hn::Repartition<hwy::bfloat16_t, D> halves;
  const D d;
  const auto load = [&](size_t c) {
    if (c + kLanes <= width) return hn::LoadU(d, from + c);
    return c < width ? hn::LoadN(d, from + c, width - c) : hn::Zero(d);
  };
  for (size_t w = 0; w < words; w += kLanes) {
    const auto packed = hn::OrderedDemote2To(halves, load(2 * w), load(2 * w + kLanes));
    hn::Store(hn::BitCast(Words(), packed), Words(), to + w);
  }
}

// sums [2 * words] += weight * what a packed row of `words` holds.
HWY_INLINE void AddWords(const uint32_t* HWY_RESTRICT row, size_t words, float weight, float* HWY_RESTRICT sums) {
  const hn::Repartition<hwy::bfloat16_t, D> halves;
  const D d;
  const V share = hn::Set(d, weight);
  for (size_t w = 0; w < words; w += kLanes, sums += 2 * kLanes) {
    const auto pairs = hn::BitCast(halves, hn::Load(Words(), row + w));
    hn::Store(hn::MulAdd(share, hn::PromoteLowerTo(d, pairs), hn::Load(d, sums)), d, sums);
    hn::Store(hn::MulAdd(share, hn::PromoteUpperTo(d, pairs), hn::Load(d, sums + kLanes)), d, sums + kLanes);
  }
}

// Two packed rows to one of words of two rows, `2 * words` long.
HWY_INLINE void Interleave(const uint32_t* HWY_RESTRICT low, const uint32_t* HWY_RESTRICT high, size_t words,
                           uint32_t* HWY_RESTRICT to) {
  const hn::Repartition<uint16_t, D> bits;
  for (size_t w = 0; w < words; w += kLanes, to += 2 * kLanes) {
    const auto x = hn::BitCast(bits, hn::Load(Words(), low + w)), y = hn::BitCast(bits, hn::Load(Words(), high + w));
    hn::Store(hn::BitCast(Words(), hn::InterleaveWholeLower(bits, x, y)), Words(), to);
    hn::Store(hn::BitCast(Words(), hn::InterleaveWholeUpper(bits, x, y)), Words(), to + kLanes);
  }
}

// The same of two rows of floats.
HWY_INLINE void PackPair(const float* HWY_RESTRICT low, const float* HWY_RESTRICT high, size_t width, size_t words,
                         uint32_t* HWY_RESTRICT to) {
  HWY_ALIGN uint32_t rows[2][2 * kLanes];
  for (size_t w = 0; w < words; w += kLanes, to += 2 * kLanes) {
    const size_t c = 2 * w, some = c < width ? std::min(width - c, 2 * kLanes) : 0;
    PackWords(low + c, some, kLanes, rows[0]);
    PackWords(high + c, some, kLanes, rows[1]);
    Interleave(rows[0], rows[1], kLanes, to);
  }
}

// rows: 16 pointers to `width` floats each -> words of two channels [words][16], times `factor`. turned: [width][16].
HWY_INLINE void PackTurned(const float* const* rows, size_t width, float factor, float* turned, uint32_t* qt) {
  Transpose16(rows, width, factor, turned);
  PairRows(turned, width, qt);
  const size_t filled = (width + 1) / 2;
  std::memset(qt + filled * kQueries, 0, (PackedWords(width) - filled) * kQueries * sizeof(uint32_t));
}

template <size_t kKeys>
HWY_INLINE void ScoreWords(const uint32_t* HWY_RESTRICT qt, const uint32_t* HWY_RESTRICT keys, size_t words,
                           float* HWY_RESTRICT scores) {
  const D d;
  V sum[kKeys][kVectors];
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sum[j][v] = hn::Zero(d);
  }
  for (size_t k = 0; k < words; ++k) {
    W q[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) q[v] = hn::Load(Words(), qt + k * kQueries + v * kLanes);
#pragma GCC unroll 16
    for (size_t j = 0; j < kKeys; ++j) {
      const W key = hn::Set(Words(), keys[j * words + k]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) sum[j][v] = Dot(key, q[v], sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) hn::Store(sum[j][v], d, scores + j * kQueries + v * kLanes);
  }
}

template <size_t kWords>
HWY_INLINE void ScoreAll(const uint32_t* qt, const uint32_t* keys, size_t words, size_t rows, float* scores) {
  if constexpr (kWords != 0) words = kWords;
  size_t j = 0;
  for (; j + kKeyBlock <= rows; j += kKeyBlock) ScoreWords<kKeyBlock>(qt, keys + j * words, words, scores + j * kQueries);
  for (; j < rows; j += 4) ScoreWords<4>(qt, keys + j * words, words, scores + j * kQueries);
}

// output[i][c] = factor[i] * (carry[i] * before[i][c] + sum over pairs of weights * values): without kBefore the sum
// starts at 0, without factor (null) the result is as it is.
template <size_t kColumns, bool kBefore>
HWY_INLINE void SumBlock(const uint32_t* HWY_RESTRICT weights, const uint32_t* HWY_RESTRICT values, size_t pairs,
                         size_t stride, size_t query, size_t channel, const float* before, const float* carry,
                         const float* factor, size_t valid, size_t width, float* output, size_t out_stride) {
  const D d;
  V sum[kQueryBlock][kColumns];
#pragma GCC unroll 8
  for (size_t i = 0; i < kQueryBlock; ++i) {
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) {
      sum[i][c] = hn::Zero(d);
      if constexpr (kBefore) {
        sum[i][c] = hn::Load(d, before + (query + i) * stride + channel + c * kLanes);
        sum[i][c] = hn::Mul(hn::Set(d, carry[query + i]), sum[i][c]);
      }
    }
  }
  for (size_t p = 0; p < pairs; ++p) {
    W value[kColumns];
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) value[c] = hn::Load(Words(), values + p * stride + channel + c * kLanes);
#pragma GCC unroll 8
    for (size_t i = 0; i < kQueryBlock; ++i) {
      const W weight = hn::Set(Words(), weights[p * kQueries + query + i]);
#pragma GCC unroll 2
      for (size_t c = 0; c < kColumns; ++c) sum[i][c] = Dot(weight, value[c], sum[i][c]);
    }
  }
  for (size_t i = 0; i < kQueryBlock && query + i < valid; ++i) {
    for (size_t c = 0; c < kColumns; ++c) {
      const size_t from = channel + c * kLanes;
      const V result = factor == nullptr ? sum[i][c] : hn::Mul(hn::Set(d, factor[query + i]), sum[i][c]);
      float* to = output + (query + i) * out_stride + from;
      if (from + kLanes <= width) {
        hn::StoreU(result, d, to);
      } else if (from < width) {
        hn::StoreN(result, d, to, width - from);
      }
    }
  }
}

// Every query and channel: output rows [0, valid) of `width` floats, `out_stride` apart; before: [16][stride].
template <bool kBefore>
HWY_NOINLINE void SumWords(const uint32_t* weights, const uint32_t* values, size_t pairs, size_t stride,
                           const float* before, const float* carry, const float* factor, size_t valid, size_t width,
                           float* output, size_t out_stride) {
  // A packed row has an even number of vectors.
  for (size_t query = 0; query < valid; query += kQueryBlock) {
    for (size_t c = 0; c < stride; c += kChannelBlock * kLanes) {
      SumBlock<kChannelBlock, kBefore>(weights, values, pairs, stride, query, c, before, carry, factor, valid, width,
                                       output, out_stride);
    }
  }
}

// Pairs of rows that weights and values have room for.
HWY_INLINE size_t PaddedPairs(size_t rows) { return RoundUp((rows + 1) / 2, kPaddedRows); }

// The products of attention, by the dot product; amx-inl.h has them too. Strides are multiples of 32; weights and values
// have room for whole tiles of pairs, and are spoiled.
struct DotProducts {
  struct Session {};  // what a thread holds meanwhile

  // scores[j][16] of packed rows; rows up to the next multiple of 16 may be read, and scores written.
  static HWY_NOINLINE void Scores(const uint32_t* qt, const uint32_t* keys, size_t words, size_t rows, float* scores) {
    // A constant stride lets the compiler use displacements in place of pointers.
    return words == 32 ? ScoreAll<32>(qt, keys, words, rows, scores) : ScoreAll<0>(qt, keys, words, rows, scores);
  }

  // output[i][c] = factor[i] * sum over pairs of weights * values: [0, valid) rows of `width`, `out_stride` apart.
  static void Sums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, float* /*scratch [16][stride]*/,
                   const float* factor, size_t valid, size_t width, float* output, size_t out_stride) {
    SumWords<false>(weights, values, pairs, stride, nullptr, nullptr, factor, valid, width, output, out_stride);
  }

  // sums[i][c] = carry[i] * sums[i][c] + sum over pairs of weights * values.
  static void AddSums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, const float* carry, float* sums) {
    SumWords<true>(weights, values, pairs, stride, sums, carry, nullptr, kQueries, stride, sums, stride);
  }
};

#endif  // a target with bfloat16
}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

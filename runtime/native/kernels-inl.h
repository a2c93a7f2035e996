// Building blocks of the kernels, compiled once per instruction set (Highway's foreach_target).
//
// Attention is computed for 16 queries at a time, one query per lane: a row of scores holds what 16 queries think of one
// key, so softmax needs no reduction across lanes, and keys are read as they lie in memory:
//
//   queries [16][d] --Transpose16--> qt [d][16]
//   keys    [rows][d] (packed)  --Scores-->  scores [rows][16]      one broadcast of a key's channel per FMA
//   scores  --Exp2-->  weights [rows][16]
//   values  [rows][d] (packed)  --Accumulate-->  output [16][d]     weights broadcast, lanes are channels
//
// Logits are in units of log 2 throughout: scale * log2(e) is folded into the queries.

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
#include "scratch.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kQueries = 16;
using D = hn::CappedTag<float, kQueries>;
using V = hn::Vec<D>;
constexpr size_t kLanes = hn::MaxLanes(D());
constexpr size_t kVectors = kQueries / kLanes;  // vectors that hold 16 queries
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Keys that are scored, and queries and channel vectors that are accumulated, at a time: what fits the registers.
constexpr size_t kKeyBlock = kLanes == 16 ? 16 : 4;
constexpr size_t kPaddedRows = 16;  // room for the rows that a padded number exceeds the real one by
constexpr size_t kQueryBlock = kLanes == 8 ? 4 : 8;
constexpr size_t kChannelBlock = 2;

HWY_INLINE size_t RoundUp(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Channels of a packed row: whole channel blocks, so that no kernel needs a remainder loop.
HWY_INLINE size_t PackedWidth(size_t width) { return RoundUp(width, kLanes); }

// 2^x for x <= 0 (clamped at -126): relative error below 1e-7. Adding 1.5 * 2^23 rounds to an integer in the low bits.
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

// One vector of 4-channel blocks: lanes 4m..4m+3 hold row (4m + i)'s channels k..k+3.
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

// rows: 16 pointers to `width` floats each -> out [width][16], times `factor`.
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

// Pointers to up to 16 rows of queries; missing ones repeat the first, whose results nobody stores.
HWY_INLINE void QueryRows(const float* first, size_t row, size_t valid, const float** rows) {
  for (size_t i = 0; i < kQueries; ++i) rows[i] = first + (i < valid ? i : 0) * row;
}

// scores[j * out_stride + i] = keys[j] . query i for `kKeys` packed rows of `stride` floats. kFetch: meanwhile the rows at
// base + ahead[j], that are gathered next, are brought into the first-level cache, one line of 16 floats at a time.
template <size_t kKeys, bool kFetch>
HWY_INLINE void ScoreBlock(const float* HWY_RESTRICT qt, const float* HWY_RESTRICT keys, size_t stride, size_t width,
                           float* HWY_RESTRICT scores, size_t out_stride, const float* base, const uint32_t* ahead) {
  const D d;
  V sum[kKeys][kVectors];
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sum[j][v] = hn::Zero(d);
  }
  for (size_t k = 0; k < width; ++k) {
    if constexpr (kFetch) hwy::Prefetch(base + ahead[k * kKeys / 64] + k % 4 * 16);
    V q[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) q[v] = hn::Load(d, qt + k * kQueries + v * kLanes);
#pragma GCC unroll 16
    for (size_t j = 0; j < kKeys; ++j) {
      const V key = hn::Set(d, keys[j * stride + k]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) sum[j][v] = hn::MulAdd(key, q[v], sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (size_t j = 0; j < kKeys; ++j) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) hn::Store(sum[j][v], d, scores + j * out_stride + v * kLanes);
  }
}

// The same for any number of rows. A constant stride lets the compiler use displacements in place of pointers.
// kPadded: rows up to the next multiple of 4 may be read, and scores written: single rows waste most of the registers.
template <size_t kStride, bool kPadded>
HWY_INLINE void ScoreRows(const float* HWY_RESTRICT qt, const float* HWY_RESTRICT keys, size_t stride, size_t width,
                          size_t rows, float* HWY_RESTRICT scores, size_t out_stride) {
  if constexpr (kStride != 0) stride = kStride;
  if constexpr (kPadded) rows = RoundUp(rows, 4);
  size_t j = 0;
  const auto block = [&](auto size) {
    constexpr size_t kSize = decltype(size)::value;
    ScoreBlock<kSize, false>(qt, keys + j * stride, stride, width, scores + j * out_stride, out_stride, nullptr, nullptr);
    j += kSize;
  };
  while (j + kKeyBlock <= rows) block(std::integral_constant<size_t, kKeyBlock>());
  if (kKeyBlock > 12 && j + 12 <= rows) block(std::integral_constant<size_t, 12>());
  if (kKeyBlock > 8 && j + 8 <= rows) block(std::integral_constant<size_t, 8>());
  if (kKeyBlock > 4 && j + 4 <= rows) block(std::integral_constant<size_t, 4>());
  while (j < rows) block(std::integral_constant<size_t, 1>());
}

template <bool kPadded>
HWY_NOINLINE void Scores(const float* qt, const float* keys, size_t stride, size_t width, size_t rows, float* scores,
                         size_t out_stride = kQueries) {
  switch (stride) {
    case 16:
      return ScoreRows<16, kPadded>(qt, keys, stride, width, rows, scores, out_stride);
    case 32:
      return ScoreRows<32, kPadded>(qt, keys, stride, width, rows, scores, out_stride);
    case 64:
      return ScoreRows<64, kPadded>(qt, keys, stride, width, rows, scores, out_stride);
    default:
      return ScoreRows<0, kPadded>(qt, keys, stride, width, rows, scores, out_stride);
  }
}

// Rows of values and of the weights that 16 queries give them.
struct Weighted {
  const float* weights;  // [rows][16]
  const float* values;   // [rows][stride], or where `places` says
  size_t rows;
  const uint32_t* places = nullptr;  // [rows]: floats from `values` to each row
};

constexpr size_t kRowsAhead = 8;

// output[i][c] = factor[i] * (carry[i] * before[i][c] + sum over parts and rows of weights * values): without kBefore the
// sum starts at 0, without kCarry `before` counts in full, without factor (null) the result is as it is.
template <size_t kRows, size_t kColumns, bool kBefore, bool kCarry>
HWY_INLINE void AccumulateBlock(const Weighted* parts, size_t count, size_t stride, size_t query, size_t channel,
                                const float* before, const float* carry, const float* factor, size_t valid,
                                size_t width, float* output, size_t out_stride) {
  const D d;
  V sum[kRows][kColumns];
#pragma GCC unroll 8
  for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) {
      sum[i][c] = hn::Zero(d);
      if constexpr (kBefore) sum[i][c] = hn::Load(d, before + (query + i) * stride + channel + c * kLanes);
      if constexpr (kCarry) sum[i][c] = hn::Mul(hn::Set(d, carry[query + i]), sum[i][c]);
    }
  }
  const auto add = [&](const float* HWY_RESTRICT weights, const float* HWY_RESTRICT row) {
    V value[kColumns];
#pragma GCC unroll 2
    for (size_t c = 0; c < kColumns; ++c) value[c] = hn::LoadU(d, row + c * kLanes);
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows; ++i) {
      const V weight = hn::Set(d, weights[i]);
#pragma GCC unroll 2
      for (size_t c = 0; c < kColumns; ++c) sum[i][c] = hn::MulAdd(weight, value[c], sum[i][c]);
    }
  };
  for (size_t p = 0; p < count; ++p) {
    const Weighted& part = parts[p];
    const float* HWY_RESTRICT weights = part.weights + query;
    const float* HWY_RESTRICT values = part.values + channel;
    const uint32_t* HWY_RESTRICT places = part.places;
    if (places == nullptr) {
      for (size_t j = 0; j < part.rows; ++j) add(weights + j * kQueries, values + j * stride);
    } else if (query == 0) {
      // The first to touch these rows; `places` goes on for kRowsAhead entries.
      for (size_t j = 0; j < part.rows; ++j) {
        for (size_t c = 0; c < kColumns * kLanes; c += 16) hwy::Prefetch(values + places[j + kRowsAhead] + c);
        add(weights + j * kQueries, values + places[j]);
      }
    } else {
      for (size_t j = 0; j < part.rows; ++j) add(weights + j * kQueries, values + places[j]);
    }
  }
  for (size_t i = 0; i < kRows && query + i < valid; ++i) {
    for (size_t c = 0; c < kColumns; ++c) {
      const size_t from = channel + c * kLanes;
      const V result = factor == nullptr ? sum[i][c] : hn::Mul(hn::Set(d, factor[query + i]), sum[i][c]);
      float* to = output + (query + i) * out_stride + from;
      if (from + kLanes <= width) {
        hn::StoreU(result, d, to);
      } else {
        hn::StoreN(result, d, to, width - from);
      }
    }
  }
}

// Every query and channel: output rows [0, valid) of `width` floats, `out_stride` apart; before: [16][stride].
template <bool kBefore, bool kCarry>
HWY_NOINLINE void Accumulate(const Weighted* parts, size_t count, size_t stride, const float* before,
                             const float* carry, const float* factor, size_t valid, size_t width, float* output,
                             size_t out_stride) {
  const size_t vectors = PackedWidth(width) / kLanes;
  for (size_t query = 0; query < RoundUp(valid, kQueryBlock); query += kQueryBlock) {
    size_t c = 0;
    for (; c + kChannelBlock <= vectors; c += kChannelBlock) {
      AccumulateBlock<kQueryBlock, kChannelBlock, kBefore, kCarry>(parts, count, stride, query, c * kLanes, before,
                                                                   carry, factor, valid, width, output, out_stride);
    }
    if (c < vectors) {
      AccumulateBlock<kQueryBlock, 1, kBefore, kCarry>(parts, count, stride, query, c * kLanes, before, carry, factor,
                                                       valid, width, output, out_stride);
    }
  }
}

// Brings a row of `width` words of four bytes into the first-level cache.
template <typename Word>
HWY_INLINE void FetchRow(const Word* row, size_t width) {
  for (size_t c = 0; c < width; c += 16) hwy::Prefetch(row + c);
}

// One row of `width` floats to a packed row of `stride`, the rest zero.
HWY_INLINE void PackRow(const float* HWY_RESTRICT from, size_t width, size_t stride, float* HWY_RESTRICT to) {
  const D d;
  size_t c = 0;
  for (; c + kLanes <= width; c += kLanes) hn::Store(hn::LoadU(d, from + c), d, to + c);
  if (c < stride) hn::Store(hn::LoadN(d, from + c, width - c), d, to + c);
}

// One query against `count` keys at rows at(j): weights exp2(logit - highest), not yet normalised; returns their sum.
// Lanes are channels. bias: added to the logit of row at(j), or null.
template <class At>
HWY_INLINE float WeighOne(const float* HWY_RESTRICT query, const float* HWY_RESTRICT keys, size_t row, const At& at,
                          size_t count, float scale, size_t width, const float* HWY_RESTRICT bias,
                          float* HWY_RESTRICT weights) {
  const D d;
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
  return hn::ReduceSum(d, total);
}

// Means over runs of `cell` rows of a head's keys or values: rows [patches] of `row` floats -> means [cells][stride].
// sizes: how much each row counts, or null: all the same.
HWY_INLINE void CellMeans(const float* rows, size_t row, const float* sizes, size_t patches, size_t cell, size_t width,
                          size_t stride, float* HWY_RESTRICT means) {
  const D d;
  for (size_t start = 0; start < patches; start += cell, means += stride) {
    const size_t end = std::min(start + cell, patches);
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
        const float* from = rows + j * row + c;
        const V x = some == kLanes ? hn::LoadU(d, from) : hn::LoadN(d, from, some);
        sum = sizes == nullptr ? hn::Add(sum, x) : hn::MulAdd(hn::Set(d, sizes[j]), x, sum);
      }
      hn::Store(hn::Mul(sum, share), d, means + c);
    }
  }
}

// What the sizes of tokens add to logits: log2 of each of `count`.
HWY_INLINE void LogSizes(const float* sizes, size_t count, float* HWY_RESTRICT logs) {
  for (size_t i = 0; i < count; ++i) logs[i] = sizes[i] == 1.0f ? 0.0f : std::log2(sizes[i]);
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// Selection of the K highest scores of a row, without sorting. Compiled once per instruction set.

#if defined(SPARSIFINER_BEST_KEYS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_BEST_KEYS_INL_H_
#undef SPARSIFINER_BEST_KEYS_INL_H_
#else
#define SPARSIFINER_BEST_KEYS_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// Maps floats (except NaN) to integers of the same order, and back.
HWY_INLINE int32_t Ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits)) : bits;
}
HWY_INLINE float Unordered(int32_t place) {
  const int32_t bits = place < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(place)) : place;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Stores the lanes selected by `mask` contiguously, followed by unspecified lanes, and returns the number of selected
// lanes. The lanes are compressed in a register, because a compressing store is microcoded and slow on Zen 4.
template <class T, class M>
HWY_INLINE size_t Compact(T d, hn::Vec<T> x, M mask, hn::TFromD<T>* HWY_RESTRICT to) {
  hn::StoreU(hn::Compress(x, mask), d, to);
  return hn::CountTrue(d, mask);
}

// Returns the number of entries in row[0, padded) that are greater than `pivot`.
HWY_INLINE size_t CountAbove(const float* HWY_RESTRICT row, size_t padded, float pivot) {
  const D d;
  const V p = hn::Set(d, pivot);
  size_t count = 0;
  for (size_t j = 0; j < padded; j += kLanes) count += hn::CountTrue(d, hn::Gt(hn::Load(d, row + j), p));
  return count;
}

// Returns the K-th largest entry (K is `keys`) of row[0, padded). `patches` of the entries are scores in (low, high];
// the others may be NaN, for which every comparison is false. `guess` is the first pivot; a good one saves passes.
// scratch: `padded` + 32 floats.
HWY_INLINE float KthLargest(const float* HWY_RESTRICT row, size_t padded, size_t patches, size_t keys, float low,
                            float high, float guess, float* HWY_RESTRICT scratch) {
  // Invariant: at least `keys` entries lie above `low`, fewer above `high`.
  const D d;
  constexpr size_t kFew = 64;
  size_t above_low = patches, above_high = 0;
  float pivot = guess;
  for (int step = 0; above_low - above_high > kFew; ++step) {
    const int64_t from = Ordered(low), to = Ordered(high);
    if (to - from <= 1) return high;
    if (!(pivot > low && pivot < high)) pivot = Unordered(static_cast<int32_t>(from + (to - from) / 2));
    const size_t count = CountAbove(row, padded, pivot);
    if (count >= keys) {
      low = pivot;
      above_low = count;
    } else {
      high = pivot;
      above_high = count;
    }
    // Interpolation finds the next pivot quickly if scores are evenly distributed between the bounds. Every third step
    // bisects, which bounds the number of steps for any distribution.
    const float share = static_cast<float>(above_low - keys) / static_cast<float>(above_low - above_high);
    pivot = step % 3 == 2 ? low : low + share * (high - low);
  }
  size_t few = 0;
  const V after = hn::Set(d, low), until = hn::Set(d, high);
  for (size_t j = 0; j < padded; j += kLanes) {
    const V x = hn::Load(d, row + j);
    few += Compact(d, x, hn::And(hn::Gt(x, after), hn::Le(x, until)), scratch + few);
  }
  for (size_t j = few; j < RoundUp(few, kLanes); ++j) scratch[j] = kLowest;
  // Among the few entries left, find the one with rank `rank`, counting ties.
  const size_t rank = keys - above_high;
  for (size_t i = 0; i < few; ++i) {
    const V x = hn::Set(d, scratch[i]);
    size_t above = 0, level = 0;
    for (size_t j = 0; j < few; j += kLanes) {
      const V other = hn::Load(d, scratch + j);
      above += hn::CountTrue(d, hn::Gt(other, x));
      level += hn::CountTrue(d, hn::Eq(other, x));
    }
    if (above < rank && rank <= above + level) return scratch[i];
  }
  return high;
}

// Writes the ascending indices of the `keys` largest entries of row[0, padded) to `list`. Ties go to the lower index.
// scratch: `padded` + 32 floats. Returns the threshold, the lowest selected score.
HWY_INLINE float BestKeys(const float* HWY_RESTRICT row, size_t padded, size_t patches, size_t keys, float low,
                          float high, float guess, float* HWY_RESTRICT scratch, int32_t* HWY_RESTRICT list) {
  const D d;
  const hn::RebindToSigned<D> di;
  // Scores of minus infinity are not above `low`. If there are fewer other scores than `keys`, select all of them and
  // the first scores of minus infinity.
  const size_t counted = low == kLowest ? CountAbove(row, padded, low) : patches;
  const float least = counted < keys ? kLowest : KthLargest(row, padded, counted, keys, low, high, guess, scratch);
  const V threshold = hn::Set(d, least);
  int32_t* HWY_RESTRICT winners = reinterpret_cast<int32_t*>(scratch);
  size_t count = 0;
  for (size_t j = 0; j < padded; j += kLanes) {
    const auto wins = hn::RebindMask(di, hn::Ge(hn::Load(d, row + j), threshold));
    count += Compact(di, hn::Iota(di, static_cast<int32_t>(j)), wins, winners + count);
  }
  if (count > keys) {
    // Too many scores equal the threshold: drop the last ones.
    size_t losers = count - keys, remaining = count;
    for (size_t i = count; i-- > 0 && losers > 0;) {
      if (row[winners[i]] == least) {
        std::memmove(winners + i, winners + i + 1, (remaining - i - 1) * sizeof(int32_t));
        --remaining;
        --losers;
      }
    }
  }
  std::memcpy(list, winners, keys * sizeof(int32_t));
  return least;
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

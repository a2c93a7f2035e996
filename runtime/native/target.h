// Which of the instruction sets that the kernels are built for runs. Highway's own dispatch does the same, but needs
// its shared library wherever the kernels run; so only its headers are used.

#ifndef SPARSIFINER_TARGET_H_
#define SPARSIFINER_TARGET_H_

#include <cstdint>

#include "hwy/highway.h"

namespace sparsifiner {

// Matrix tiles beside HWY_AVX3_ZEN4: no target of Highway's. Processors that have them are better than that one.
constexpr int64_t kAmx = HWY_AVX3_SPR;

// Those with a dot product of bfloat16, for which bf16.cc alone is built; the rest runs as on the next lesser one, which
// must be there.
constexpr int64_t kBf16Targets = (HWY_TARGETS & HWY_AVX3 && !(HWY_BROKEN_TARGETS & HWY_AVX3_ZEN4) ? kAmx | HWY_AVX3_ZEN4 : 0) |
                                 (HWY_TARGETS & HWY_NEON ? HWY_NEON_BF16 & ~HWY_BROKEN_TARGETS : 0);

// The best one of this machine, or a lesser one that LimitTarget chose: a bit of HWY_TARGETS or kBf16Targets.
int64_t Target();

template <typename Function>
Function* Choose(Function* avx3, Function* avx2, Function* neon, Function* baseline) {
  switch (Target()) {
    case kAmx:
    case HWY_AVX3_ZEN4:
    case HWY_AVX3:
      return avx3;
    case HWY_AVX2:
      return avx2;
    case HWY_NEON_BF16:
    case HWY_NEON:
      return neon;
    default:
      return baseline;
  }
}

// A function of HWY_NAMESPACE, as built for Target(); after the last pass of foreach_target.h only.
#define SPARSIFINER_BUILT(function)                                                                     \
  (*sparsifiner::Choose<decltype(HWY_STATIC_DISPATCH(function))>(                                       \
      HWY_CHOOSE_AVX3(function), HWY_CHOOSE_AVX2(function), HWY_CHOOSE_NEON(function), &HWY_STATIC_DISPATCH(function)))

}  // namespace sparsifiner

#endif  // SPARSIFINER_TARGET_H_

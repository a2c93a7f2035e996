// Which of the instruction sets that the kernels are built for runs. Highway's own dispatch does the same, but needs
// its shared library wherever the kernels run; so only its headers are used.

#ifndef SPARSIFINER_TARGET_H_
#define SPARSIFINER_TARGET_H_

#include <cstdint>

#include "hwy/highway.h"

namespace sparsifiner {

// Matrix tiles beside HWY_AVX3_ZEN4: no target of Highway's. Processors that have them are better than that one.
constexpr int64_t kAmx = HWY_AVX3_SPR;

// Whether foreach_target.h's pass is that of a set with a dot product of bfloat16, for which attention.cc alone is built.
#define SPARSIFINER_BF16 (HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_NEON_BF16)

// Those sets; the rest runs as on the next lesser one, which must be there.
constexpr int64_t kBf16Targets = (HWY_TARGETS & HWY_AVX3 && !(HWY_BROKEN_TARGETS & HWY_AVX3_ZEN4) ? kAmx | HWY_AVX3_ZEN4 : 0) |
                                 (HWY_TARGETS & HWY_NEON ? HWY_NEON_BF16 & ~HWY_BROKEN_TARGETS : 0);

// The best one of this machine, or a lesser one that sparsifiner_limit_target chose: a bit of HWY_TARGETS or kBf16Targets.
int64_t Target();

// What is built for Target(), or for the compiler's own floor where that is as good.
template <typename Built>
Built* Choose(Built* avx3, Built* avx2, Built* neon, Built* floor) {
  Built* built = nullptr;
  if (Target() & (kAmx | HWY_AVX3_ZEN4 | HWY_AVX3)) built = avx3;
  if (Target() & HWY_AVX2) built = avx2;
  if (Target() & (HWY_NEON_BF16 | HWY_NEON)) built = neon;
  return built == nullptr ? floor : built;
}

// A function or constant of HWY_NAMESPACE, as built for Target(); after the last pass of foreach_target.h only.
#define SPARSIFINER_BUILT(name)                                                                     \
  (*sparsifiner::Choose<decltype(HWY_STATIC_DISPATCH(name))>(HWY_CHOOSE_AVX3(name), HWY_CHOOSE_AVX2(name), \
                                                             HWY_CHOOSE_NEON(name), &HWY_STATIC_DISPATCH(name)))

}  // namespace sparsifiner

#endif  // SPARSIFINER_TARGET_H_

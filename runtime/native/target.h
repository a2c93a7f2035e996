// Choice of the instruction set at run time. Highway's own dispatch does the same, but would require Highway's shared
// library at run time; here only its headers are needed.

#ifndef SPARSIFINER_TARGET_H_
#define SPARSIFINER_TARGET_H_

#include <cstdint>

#include "hwy/highway.h"

namespace sparsifiner {

// HWY_AVX3_ZEN4 plus matrix tiles (Intel AMX), for which Highway has no target. It ranks above HWY_AVX3_ZEN4 and uses
// the bit of HWY_AVX3_SPR, for which nothing is built.
constexpr int64_t kAmx = HWY_AVX3_SPR;

// True if the current pass of foreach_target.h is for an instruction set with a bfloat16 dot product. Only attention.cc
// is built for those.
#define SPARSIFINER_BF16 (HWY_TARGET == HWY_AVX3_ZEN4 || HWY_TARGET == HWY_NEON_BF16)

// Instruction sets with a bfloat16 dot product. All other code uses the next lower set, which must also be built.
constexpr int64_t kBf16Targets = (HWY_TARGETS & HWY_AVX3 && !(HWY_BROKEN_TARGETS & HWY_AVX3_ZEN4) ? kAmx | HWY_AVX3_ZEN4 : 0) |
                                 (HWY_TARGETS & HWY_NEON ? HWY_NEON_BF16 & ~HWY_BROKEN_TARGETS : 0);

// Returns the best instruction set of this machine, or the one that sparsifiner_limit_target selected: a bit of
// HWY_TARGETS or kBf16Targets.
int64_t Target();

// Returns the version that is built for Target(), or the one for the compiler's baseline if that is equivalent.
template <typename Built>
Built* Choose(Built* avx3, Built* avx2, Built* neon, Built* floor) {
  Built* built = nullptr;
  if (Target() & (kAmx | HWY_AVX3_ZEN4 | HWY_AVX3)) built = avx3;
  if (Target() & HWY_AVX2) built = avx2;
  if (Target() & (HWY_NEON_BF16 | HWY_NEON)) built = neon;
  return built == nullptr ? floor : built;
}

// Function or constant of HWY_NAMESPACE, as built for Target(). Use it only after the last pass of foreach_target.h.
#define SPARSIFINER_BUILT(name)                                                                     \
  (*sparsifiner::Choose<decltype(HWY_STATIC_DISPATCH(name))>(HWY_CHOOSE_AVX3(name), HWY_CHOOSE_AVX2(name), \
                                                             HWY_CHOOSE_NEON(name), &HWY_STATIC_DISPATCH(name)))

}  // namespace sparsifiner

#endif  // SPARSIFINER_TARGET_H_

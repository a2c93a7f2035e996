#include "target.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels.h"

#if HWY_ARCH_X86
#include <cpuid.h>
#elif HWY_ARCH_ARM_A64
#include <sys/auxv.h>
#endif

namespace sparsifiner {
namespace {

// Those that the kernels are built for and this machine and its system have: the compiler's own floor at least.
int64_t Supported() {
  int64_t targets = HWY_STATIC_TARGET;
#if HWY_ARCH_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  const bool lzcnt = __get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx) && (ecx >> 5 & 1);
  if (f16c && lzcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    targets |= HWY_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")) {
      targets |= HWY_AVX3;
    }
  }
#elif HWY_ARCH_ARM_A64
  constexpr unsigned long kAes = 1ul << 3;  // HWCAP_AES: what Highway's NEON has beyond the floor
  if (getauxval(AT_HWCAP) & kAes) targets |= HWY_NEON;
#endif
  return targets & HWY_TARGETS;
}

std::atomic<int64_t> chosen{0};

}  // namespace

int64_t Target() {
  int64_t target = chosen.load(std::memory_order_relaxed);
  if (target == 0) {
    const int64_t supported = Supported();
    target = supported & -supported;  // better targets have lower bits
    chosen.store(target, std::memory_order_relaxed);
  }
  return target;
}

const char* TargetName() { return hwy::TargetName(Target()); }

bool LimitTarget(const char* name) {
  for (int64_t left = Supported(); left != 0; left &= left - 1) {
    const int64_t target = left & -left;
    if (std::strcmp(hwy::TargetName(target), name) != 0) continue;
    chosen.store(target, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace sparsifiner

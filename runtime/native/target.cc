#include "target.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "sparsifiner.h"

#if HWY_ARCH_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif HWY_ARCH_ARM_A64
#include <sys/auxv.h>
#endif

namespace sparsifiner {
namespace {

#if HWY_ARCH_X86 && SPARSIFINER_EMULATE_AMX
bool HasTiles() { return true; }
#elif HWY_ARCH_X86
// Returns true if the processor has AMX with bfloat16 and Linux permits its use. Linux allocates the state of the
// tiles, 8 KB per thread, only to processes that request permission.
bool HasTiles() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTile | kBf16)) != (kTile | kBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const char* Name(int64_t target) { return target == kAmx ? "AMX" : hwy::TargetName(target); }

// Returns the instruction sets that the kernels are built for and that the machine and its operating system support.
// The compiler's baseline is always included.
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
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
          __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
          __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq") &&
          __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("vaes")) {
        targets |= HWY_AVX3_ZEN4;
        if (HasTiles()) targets |= kAmx;
      }
    }
  }
#elif HWY_ARCH_ARM_A64
  // Highway's NEON target needs AES beyond the baseline. Its NEON_BF16 target also needs FPHP, ASIMDHP and ASIMDDP.
  constexpr unsigned long kAes = 1ul << 3, kHalf = kAes | 1ul << 9 | 1ul << 10 | 1ul << 20, kBf16 = 1ul << 14;
  const unsigned long has = getauxval(AT_HWCAP);
  if (has & kAes) targets |= HWY_NEON;
  if ((has & kHalf) == kHalf && (getauxval(AT_HWCAP2) & kBf16)) targets |= HWY_NEON_BF16;
#endif
  return targets & (HWY_TARGETS | kBf16Targets);
}

std::atomic<int64_t> chosen{0};  // target in use; 0: not determined yet

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

}  // namespace sparsifiner

const char* sparsifiner_target(void) { return sparsifiner::Name(sparsifiner::Target()); }

int sparsifiner_limit_target(const char* name) {
  for (int64_t targets = sparsifiner::Supported(); targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    if (std::strcmp(sparsifiner::Name(target), name) != 0) continue;
    sparsifiner::chosen.store(target, std::memory_order_relaxed);
    return 1;
  }
  return 0;
}

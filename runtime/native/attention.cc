// DenseAttention, CachedAttention and SparseAttention (ops/schema.py) in each precision.

// This file is also built for instruction sets with bfloat16 products, but only in bfloat16: in float32 they are no
// faster than the next lower set.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_SPR | HWY_ALL_SVE)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "bf16-inl.h"
#include "dense-inl.h"
#include "hwy/highway.h"
#include "kernels.h"
#include "sparse-inl.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

#if !SPARSIFINER_BF16 || HWY_TARGET == HWY_STATIC_TARGET
constexpr Attention kFloats{AttendDensely<Floats>, AttendSparsely<Floats>};
#endif
#if SPARSIFINER_BF16
constexpr Attention kHalves{AttendDensely<Halves>, AttendSparsely<Halves>};
#endif
#if HWY_TARGET == HWY_AVX3_ZEN4
constexpr Attention kTiledHalves{AttendDensely<TiledHalves>, AttendSparsely<TiledHalves>};
#endif

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparsifiner {

const Attention* FindAttention(sparsifiner_precision precision) {
  switch (precision) {
    case SPARSIFINER_FLOAT32:
      return &SPARSIFINER_BUILT(kFloats);
    case SPARSIFINER_BFLOAT16:
#if HWY_TARGETS & HWY_AVX3_ZEN4
      if (Target() == kAmx) return &N_AVX3_ZEN4::kTiledHalves;
      if (Target() == HWY_AVX3_ZEN4) return &N_AVX3_ZEN4::kHalves;
#elif HWY_TARGETS & HWY_NEON_BF16
      if (Target() == HWY_NEON_BF16) return &N_NEON_BF16::kHalves;
#endif
      return nullptr;
    default:
      return nullptr;
  }
}

}  // namespace sparsifiner
#endif

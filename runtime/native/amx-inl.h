// Products of attention in bfloat16 on matrix tiles (Intel AMX): 16 rows of 16 words each. The layouts of bf16-inl.h are
// what tiles want, except that of the weights. One instruction adds what 512 multiplications of pairs give:
//
//   scores [16 keys][16 queries]      += keys    [16 keys][16 words]    * qt     [16 words][16 queries]
//   sums   [16 queries][16 channels]  += weights [16 queries][16 words] * values [16 words][16 channels]
//
// Numbers too small to be normal count as 0 there. Sums of a word's lower and upper halves are kept apart until the end
// of a row of words: results differ from the dot product's in their last bits.

#if defined(SPARSIFINER_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_AMX_INL_H_
#undef SPARSIFINER_AMX_INL_H_
#else
#define SPARSIFINER_AMX_INL_H_
#endif

#include "bf16-inl.h"
#include "hwy/highway.h"
#include "kernels-inl.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
#if HWY_TARGET == HWY_AVX3_ZEN4

constexpr size_t kTileRows = 16;

#if SPARSIFINER_EMULATE_AMX

// The registers, for tests on machines that have none.
inline uint32_t (&Register(size_t t))[kTileRows][16] {
  static thread_local uint32_t registers[8][kTileRows][16];
  return registers[t];
}

struct TileSession {};

#define SPARSIFINER_TILE_ZERO(t) std::memset(Register(t), 0, sizeof(Register(t)))

inline void MoveTile(size_t t, void* memory, size_t stride, bool load) {
  for (size_t r = 0; r < kTileRows; ++r) {
    char* row = static_cast<char*>(memory) + r * stride;
    load ? std::memcpy(Register(t)[r], row, 64) : std::memcpy(row, Register(t)[r], 64);
  }
}
#define SPARSIFINER_TILE_LOAD(t, from, stride) MoveTile(t, const_cast<void*>(static_cast<const void*>(from)), stride, true)
#define SPARSIFINER_TILE_STORE(t, to, stride) MoveTile(t, to, stride, false)

inline void TileProduct(size_t c, size_t a, size_t b) {
  const auto half = [](uint32_t word, bool upper) { return hwy::BitCastScalar<float>(upper ? word & 0xffff0000u : word << 16); };
  for (size_t r = 0; r < kTileRows; ++r) {
    for (size_t n = 0; n < 16; ++n) {
      float even = 0.0f, odd = 0.0f;
      for (size_t k = 0; k < 16; ++k) {
        const uint32_t x = Register(a)[r][k], y = Register(b)[k][n];
        even = std::fma(half(x, false), half(y, false), even);
        odd = std::fma(half(x, true), half(y, true), odd);
      }
      uint32_t& sum = Register(c)[r][n];
      sum = hwy::BitCastScalar<uint32_t>(hwy::BitCastScalar<float>(sum) + (even + odd));
    }
  }
}
#define SPARSIFINER_TILE_PRODUCT(c, a, b) TileProduct(c, a, b)

#else

// Compilers' own functions for these take no note of what they read and write.
#define SPARSIFINER_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define SPARSIFINER_TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(size_t{stride}) : "memory")
#define SPARSIFINER_TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(size_t{stride}) : "memory")
#define SPARSIFINER_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

// While it lives, a thread's eight registers are whole tiles. Then they are configured as before: whoever called, or runs
// on this thread next, may believe that they still are.
class TileSession {
 public:
  TileSession() {
    asm volatile("sttilecfg %0" : "=m"(before_) : : "memory");
    Config whole{};
    whole.palette = 1;
    for (size_t t = 0; t < 8; ++t) {
      whole.row_bytes[t] = 64;
      whole.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(whole) : "memory");
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
  ~TileSession() { asm volatile("ldtilecfg %0" : : "m"(before_) : "memory"); }

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64, "as the instructions have it");
  Config before_;
};

#endif

// scores[j][16] of packed rows; rows up to the next multiple of 16 are read, and scores written.
inline HWY_NOINLINE void TileScores(const uint32_t* qt, const uint32_t* keys, size_t words, size_t rows, float* scores) {
  const size_t row = words * sizeof(uint32_t);
  size_t j = 0;
  for (; j + kTileRows < rows; j += 2 * kTileRows, keys += 2 * kTileRows * words, scores += 2 * kTileRows * kQueries) {
    SPARSIFINER_TILE_ZERO(0);
    SPARSIFINER_TILE_ZERO(1);
    for (size_t w = 0; w < words; w += 16) {
      SPARSIFINER_TILE_LOAD(4, qt + w * kQueries, 64);
      SPARSIFINER_TILE_LOAD(2, keys + w, row);
      SPARSIFINER_TILE_LOAD(3, keys + kTileRows * words + w, row);
      SPARSIFINER_TILE_PRODUCT(0, 2, 4);
      SPARSIFINER_TILE_PRODUCT(1, 3, 4);
    }
    SPARSIFINER_TILE_STORE(0, scores, 64);
    SPARSIFINER_TILE_STORE(1, scores + kTileRows * kQueries, 64);
  }
  if (j >= rows) return;
  SPARSIFINER_TILE_ZERO(0);
  for (size_t w = 0; w < words; w += 16) {
    SPARSIFINER_TILE_LOAD(4, qt + w * kQueries, 64);
    SPARSIFINER_TILE_LOAD(2, keys + w, row);
    SPARSIFINER_TILE_PRODUCT(0, 2, 4);
  }
  SPARSIFINER_TILE_STORE(0, scores, 64);
}

// [16][16] words, transposed where they are.
HWY_INLINE void Turn(uint32_t* words) {
  const Words d;
  W from[16], to[16];
#pragma GCC unroll 16
  for (size_t i = 0; i < 16; ++i) from[i] = hn::Load(d, words + i * 16);
  // Row and column are a number of eight bits; each step moves its highest bit to the lowest place.
#pragma GCC unroll 4
  for (size_t step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      to[2 * i] = hn::InterleaveWholeLower(d, from[i], from[i + 8]);
      to[2 * i + 1] = hn::InterleaveWholeUpper(d, from[i], from[i + 8]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; ++i) from[i] = to[i];
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < 16; ++i) hn::Store(from[i], d, words + i * 16);
}

// sums[i][c] = sum over pairs of weights * values, and with kMore what is there already. What is beyond the last pair,
// up to a multiple of 16, becomes zeros, and weights are transposed.
template <bool kMore>
HWY_NOINLINE void TileSums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, float* sums) {
  const size_t row = stride * sizeof(float), missing = RoundUp(pairs, kTileRows) - pairs;
  std::memset(weights + pairs * kQueries, 0, missing * kQueries * sizeof(uint32_t));
  std::memset(values + pairs * stride, 0, missing * stride * sizeof(uint32_t));
  for (size_t p = 0; p < pairs; p += kTileRows) Turn(weights + p * kQueries);
  for (size_t c = 0; c < stride; c += 32) {
    if constexpr (kMore) {
      SPARSIFINER_TILE_LOAD(0, sums + c, row);
      SPARSIFINER_TILE_LOAD(1, sums + c + 16, row);
    } else {
      SPARSIFINER_TILE_ZERO(0);
      SPARSIFINER_TILE_ZERO(1);
    }
    for (size_t p = 0; p < pairs; p += kTileRows) {
      SPARSIFINER_TILE_LOAD(2, weights + p * kQueries, 64);
      SPARSIFINER_TILE_LOAD(3, values + p * stride + c, row);
      SPARSIFINER_TILE_LOAD(4, values + p * stride + c + 16, row);
      SPARSIFINER_TILE_PRODUCT(0, 2, 3);
      SPARSIFINER_TILE_PRODUCT(1, 2, 4);
    }
    SPARSIFINER_TILE_STORE(0, sums + c, row);
    SPARSIFINER_TILE_STORE(1, sums + c + 16, row);
  }
}

// As DotProducts.
struct TileProducts {
  using Session = TileSession;

  static void Scores(const uint32_t* qt, const uint32_t* keys, size_t words, size_t rows, float* scores) {
    TileScores(qt, keys, words, rows, scores);
  }

  static void Sums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, float* scratch, const float* factor,
                   size_t valid, size_t width, float* output, size_t out_stride) {
    TileSums<false>(weights, values, pairs, stride, scratch);
    for (size_t i = 0; i < valid; ++i, scratch += stride, output += out_stride) {
      const V share = hn::Set(D(), factor[i]);
      for (size_t c = 0; c < width; c += kLanes) {
        hn::StoreN(hn::Mul(share, hn::Load(D(), scratch + c)), D(), output + c, width - c);
      }
    }
  }

  static void AddSums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, const float* carry, float* sums) {
    for (size_t i = 0; i < kQueries; ++i) {
      const V share = hn::Set(D(), carry[i]);
      for (size_t c = 0; c < stride; c += kLanes) {
        hn::Store(hn::Mul(share, hn::Load(D(), sums + i * stride + c)), D(), sums + i * stride + c);
      }
    }
    TileSums<true>(weights, values, pairs, stride, sums);
  }
};

#endif  // a target with bfloat16 and 16 lanes
}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

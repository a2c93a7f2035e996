// Bfloat16 arithmetic of attention (see "Kinds of arithmetic" in kernels-inl.h), for instruction sets with a bfloat16
// dot product.
//
// A 32-bit word holds two bfloat16 numbers. One instruction multiplies two pairs of them and adds both products to a
// float32 sum, which halves the number of instructions compared with float32:
//
//   qt      [d/2][16]     words of two channels      keys    [rows][d/2]   words of two channels
//   weights [rows/2][16]  words of two rows          values  [rows/2][d]   words of two rows
//
// Rounding is to nearest even. The relative error of a background token's weight grows if the listed keys of its pool
// far outnumber the others and the others have the higher logits. That is rare, since selection lists keys with high
// scores.

#if defined(SPARSIFINER_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_BF16_INL_H_
#undef SPARSIFINER_BF16_INL_H_
#else
#define SPARSIFINER_BF16_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "target.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {
#if SPARSIFINER_BF16

using Words = hn::RebindToUnsigned<D>;
using W = hn::Vec<Words>;

// Number of words in a packed row, rounded up to whole vectors.
HWY_INLINE size_t PackedWords(size_t width) { return RoundUp(width, 2 * kLanes) / 2; }

// Table of lane indices that interleaves the 16-bit lanes of a vector's lower and upper half.
struct InTurn {
  constexpr InTurn() {
    for (size_t i = 0; i < 2 * kLanes; ++i) from[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
  }
  alignas(64) uint16_t from[2 * kLanes] = {};
};
constexpr InTurn kInTurn;

// Rounds two vectors and returns words with `low` in the lower and `high` in the upper half.
HWY_INLINE W Pair(V low, V high) {
  const hn::Repartition<hwy::bfloat16_t, D> halves;
  const hn::Repartition<uint16_t, D> bits;
  const auto both = hn::BitCast(bits, hn::OrderedDemote2To(halves, low, high));
  return hn::BitCast(Words(), hn::TableLookupLanes(both, hn::SetTableIndices(bits, kInTurn.from)));
}

// Packs a row of `width` floats into words of two channels; missing channels are zero.
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

// sums[2 * words] += weight * packed row of `words` words.
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

// Bfloat16 counterpart of Floats (kernels-inl.h).
struct Halves {
  using Word = uint32_t;
  struct Session {};
  static constexpr size_t kRows = 2;
  static constexpr bool kRounds = true;

  static HWY_INLINE V AddProduct(W a, W b, V sum) {
    const hn::Repartition<hwy::bfloat16_t, D> halves;
    V unused = hn::Zero(D());
    return hn::ReorderWidenMulAccumulate(D(), hn::BitCast(halves, a), hn::BitCast(halves, b), sum, unused);
  }

  static size_t RowWords(size_t width) { return PackedWords(width); }
  static size_t Stride(size_t width) { return 2 * PackedWords(width); }

  static void PackQueries(const float* const* rows, size_t width, float factor, float* turned, uint32_t* qt) {
    Transpose16(rows, width, factor, turned);
    PairRows(turned, width, qt);
    const size_t filled = (width + 1) / 2;
    std::memset(qt + filled * kQueries, 0, (PackedWords(width) - filled) * kQueries * sizeof(uint32_t));
  }
  static void PackRow(const float* from, size_t width, uint32_t* to) { PackWords(from, width, PackedWords(width), to); }
  static void Scores(const uint32_t* qt, const uint32_t* keys, size_t width, size_t rows, float* scores) {
    HWY_NAMESPACE::Scores<Halves, true>(qt, keys, PackedWords(width), PackedWords(width), rows, scores);
  }
  static void PackValues(const float* low, const float* high, size_t width, uint32_t* to) {
    HWY_ALIGN uint32_t rows[2][2 * kLanes];
    for (size_t w = 0; w < PackedWords(width); w += kLanes, to += 2 * kLanes) {
      const size_t c = 2 * w, some = c < width ? std::min(width - c, 2 * kLanes) : 0;
      PackWords(low + c, some, kLanes, rows[0]);
      PackWords(high + c, some, kLanes, rows[1]);
      JoinValues(rows[0], rows[1], kLanes, to);
    }
  }
  static void KeepWeights(V a, V b, size_t j, size_t v, uint32_t* weights) {
    hn::Store(Pair(a, b), Words(), weights + j / 2 * kQueries + v);
  }
  static uint32_t* TakeWeights(Layout* layout, size_t rows, float* /*scores*/) {
    return layout->Take<uint32_t>(RoundUp(Groups(rows, 2), kPaddedRows), kQueries);
  }
  static void AddSums(uint32_t* weights, uint32_t* values, size_t count, size_t stride, const float* carry, float* sums) {
    Accumulate<Halves, true>(
        {weights, values, count, stride, nullptr, sums, carry, nullptr, {sums, false}, kQueries, stride, stride});
  }

  // The functions below are needed by sparse-inl.h for kinds that round.

  // Interleaves the values of two packed rows.
  static HWY_INLINE void JoinValues(const uint32_t* HWY_RESTRICT low, const uint32_t* HWY_RESTRICT high, size_t words,
                                    uint32_t* HWY_RESTRICT to) {
    const hn::Repartition<uint16_t, D> bits;
    for (size_t w = 0; w < words; w += kLanes, to += 2 * kLanes) {
      const auto x = hn::BitCast(bits, hn::Load(Words(), low + w)), y = hn::BitCast(bits, hn::Load(Words(), high + w));
      hn::Store(hn::BitCast(Words(), hn::InterleaveWholeLower(bits, x, y)), Words(), to);
      hn::Store(hn::BitCast(Words(), hn::InterleaveWholeUpper(bits, x, y)), Words(), to + kLanes);
    }
  }

  // Packs pairs of rows of [rows][16] floats into words. If the number of rows is odd, the last one is paired with
  // zeros.
  static void PairRows(const float* HWY_RESTRICT from, size_t rows, uint32_t* HWY_RESTRICT to) {
    const D d;
    for (size_t k = 0; k < rows; k += 2, from += 2 * kQueries, to += kQueries) {
      for (size_t v = 0; v < kQueries; v += kLanes) {
        const V high = k + 1 < rows ? hn::Load(d, from + kQueries + v) : hn::Zero(d);
        hn::Store(Pair(hn::Load(d, from + v), high), Words(), to + v);
      }
    }
  }

  // Writes output[i] = factor[i] * (sum over rows of weights * values) for i in [0, valid): rows of `width` elements,
  // `out_stride` apart.
  static void Sums(uint32_t* weights, uint32_t* values, size_t count, size_t stride, float* /*scratch [16][stride]*/,
                   const float* factor, size_t valid, size_t width, const Output& output, size_t out_stride) {
    Accumulate<Halves, false>(
        {weights, values, count, stride, nullptr, nullptr, nullptr, factor, output, valid, width, out_stride});
  }

  // Computes the mean of a pool's rounded keys, as a bfloat16 mean plus the `rest` that rounding removed from it. The
  // logits of listed keys are subtracted from the pool's logit, so both must come from the same rounded keys; if few
  // keys of a pool are left, any difference between the two is amplified.
  static void PoolMean(const uint32_t* rows, size_t words, const float* sizes, size_t count, size_t /*width*/,
                       float* sum, uint32_t* mean, uint32_t* rest) {
    float total = 0.0f;
    std::memset(sum, 0, 2 * words * sizeof(float));
    for (size_t j = 0; j < count; ++j) {
      const float size = sizes == nullptr ? 1.0f : sizes[j];
      AddWords(rows + j * words, words, size, sum);
      total += size;
    }
    for (size_t c = 0; c < 2 * words; ++c) sum[c] *= 1.0f / total;
    PackWords(sum, 2 * words, words, mean);
    if (rest == nullptr) return;
    AddWords(mean, words, -1.0f, sum);
    PackWords(sum, 2 * words, words, rest);
  }
};

#endif  // a target with bfloat16
#if HWY_TARGET == HWY_AVX3_ZEN4

// ---------------------------------------------------------------------------------------------------------------------
// The same on matrix tiles (Intel AMX) of 16 rows of 16 words. Tiles use the layouts above, except that weights are
// transposed. One instruction multiplies two tiles and adds the product to a third:
//
//   scores [16 keys][16 queries]      += keys    [16 keys][16 words]    * qt     [16 words][16 queries]
//   sums   [16 queries][16 channels]  += weights [16 queries][16 words] * values [16 words][16 channels]
//
// AMX treats denormal numbers as 0, and adds the products of the lower and upper halves of words in two separate sums
// until the end of a row. Results therefore differ from those of the dot product in the last bits.

constexpr size_t kTileRows = 16;

#if SPARSIFINER_EMULATE_AMX

// Emulated tile registers, for tests on machines without AMX.
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

// Inline assembly, because the compilers' intrinsics do not declare the memory and the tiles that they access.
#define SPARSIFINER_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define SPARSIFINER_TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(size_t{stride}) : "memory")
#define SPARSIFINER_TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(size_t{stride}) : "memory")
#define SPARSIFINER_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

// Configures the thread's eight registers as full tiles. The destructor restores the previous configuration, on which
// other code on this thread may rely.
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
  static_assert(sizeof(Config) == 64, "layout of the operand of ldtilecfg");
  Config before_;
};

#endif

// Transposes [16][16] words in place.
HWY_INLINE void Turn(uint32_t* words) {
  const Words d;
  W from[16], to[16];
#pragma GCC unroll 16
  for (size_t i = 0; i < 16; ++i) from[i] = hn::Load(d, words + i * 16);
  // The position of a word is an 8-bit number: 4 bits of row, 4 bits of column. Each step rotates it left by one bit,
  // so four steps swap row and column.
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

// sums[i][c] = (sum over pairs of weights * values), plus the previous sums[i][c] if kMore. The inputs are modified:
// rows after the last pair are set to zero up to a multiple of 16, and the weights are transposed.
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

// Halves on matrix tiles.
struct TiledHalves : Halves {
  using Session = TileSession;

  static HWY_NOINLINE void Scores(const uint32_t* qt, const uint32_t* keys, size_t width, size_t rows, float* scores) {
    const size_t words = PackedWords(width);
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

  static void Sums(uint32_t* weights, uint32_t* values, size_t pairs, size_t stride, float* scratch, const float* factor,
                   size_t valid, size_t width, const Output& output, size_t out_stride) {
    TileSums<false>(weights, values, pairs, stride, scratch);
    for (size_t i = 0; i < valid; ++i, scratch += stride) {
      const V share = hn::Set(D(), factor[i]);
      for (size_t c = 0; c < width; c += kLanes) {
        Put(hn::Mul(share, hn::Load(D(), scratch + c)), width - c, output.From(i * out_stride + c));
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

// What one tile of SparseAttention does with its list and with the background cells; compiled once per instruction set.

#if defined(SPARSIFINER_SPARSE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARSIFINER_SPARSE_TILE_INL_H_
#undef SPARSIFINER_SPARSE_TILE_INL_H_
#else
#define SPARSIFINER_SPARSE_TILE_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels-inl.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace sparsifiner {
namespace HWY_NAMESPACE {

// Tokens of a list: prefix first, then the patches listed, clamped to those that exist.
struct List {
  const int32_t* patches;
  size_t prefix, count, limit;

  HWY_INLINE size_t At(size_t j) const {
    if (j < prefix) return j;
    return prefix + std::min(static_cast<size_t>(static_cast<uint32_t>(patches[j - prefix])), limit - 1);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: 16 queries, one list.

// Tokens from which a head's keys and values are packed first. In qkv its rows lie far apart, most of them on pages of
// their own, and every tile reads its list anew; a short image is read through before packing would pay.
constexpr size_t kPackFrom = 2048;

struct SparseJob {
  Packed in;
  SparseSettings settings;
  const int32_t* indices;
  float* output;
  size_t patches, tiles, cells, stride;
  size_t run, runs;    // patches packed together, a cell's where there are cells
  size_t row;            // floats between a head's keys, and its values
  float* packed_keys;    // [batch * heads][tokens][stride], or null: read where they are
  float* packed_values;  // the same
  float* cell_keys;    // [batch * heads][cells][stride]
  float* cell_values;  // the same
  const float* logs;         // log2 of 0..cell; of 0: the lowest float
  const uint16_t* cell_of;   // [patches]
  float* bias;         // [batch][tokens]: log2 of sizes; null, as are the next, where all tokens are single
  float* cell_sizes;   // [batch][cells]: sums of sizes
};

HWY_INLINE const float* KeysOf(const SparseJob& job, size_t batch, size_t head) {
  if (job.packed_keys == nullptr) return job.in.Keys(batch, head);
  return job.packed_keys + (batch * job.in.heads + head) * job.in.tokens * job.stride;
}

HWY_INLINE const float* ValuesOf(const SparseJob& job, size_t batch, size_t head) {
  if (job.packed_values == nullptr) return job.in.Values(batch, head);
  return job.packed_values + (batch * job.in.heads + head) * job.in.tokens * job.stride;
}

// One run of a head's keys or values: packed where they shall be, and their mean where there are cells.
HWY_NOINLINE void PrepareRun(void* data, size_t item, void*) {
  const SparseJob& job = *static_cast<const SparseJob*>(data);
  const Packed& in = job.in;
  const size_t run = item % job.runs, which = item / job.runs % 2, batch_head = item / job.runs / 2;
  const size_t head = batch_head % in.heads, batch = batch_head / in.heads;
  const float* rows = which ? in.Values(batch, head) : in.Keys(batch, head);
  const size_t begin = job.settings.prefix + run * job.run, end = std::min(begin + job.run, in.tokens);
  if (job.packed_keys != nullptr) {
    float* packed = (which ? job.packed_values : job.packed_keys) + batch_head * in.tokens * job.stride;
    for (size_t j = run ? begin : 0; j < end; ++j) {
      PackRow(rows + j * in.Row(), in.width, job.stride, packed + j * job.stride);
    }
    rows = packed;
  }
  if (job.cells == 0) return;
  float* means = (which ? job.cell_values : job.cell_keys) + (batch_head * job.cells + run) * job.stride;
  const size_t width = job.packed_keys == nullptr ? in.width : job.stride;
  const float* sizes = in.sizes == nullptr ? nullptr : in.sizes + batch * in.tokens + begin;
  CellMeans(rows + begin * job.row, job.row, sizes, end - begin, job.run, width, job.stride, means);
}

// What a tile's list leaves of each cell, as numbers of single tokens.
struct Rest {
  float *whole, *listed, *rest, *log_rest;  // [R]; rest is 0 where all are listed
  float* sizes;                             // [K]: of the listed keys, where tokens are merged
};

// Logits of the cells, less what was selected. selected: [count][16] logits of the listed keys; cells: [R][16], on entry
// those of whole cells, on exit those of the rest, raised by the log of its number. sums: scratch [R][16].
template <bool kSized>
HWY_INLINE void RestOfCells(const SparseJob& job, const uint16_t* owner, size_t count, const float* selected,
                            const Rest& left, float* HWY_RESTRICT sums, float* HWY_RESTRICT cells) {
  const D d;
  std::memset(sums, 0, job.cells * kQueries * sizeof(float));
  for (size_t v = 0; v < kQueries; v += kLanes) {
    const auto logit = [&](size_t j) {
      const V x = hn::Load(d, selected + j * kQueries + v);
      return kSized ? hn::Mul(hn::Set(d, left.sizes[j]), x) : x;
    };
    // Lists ascend, so that a cell's keys come in one run; any other order is right too, and slower.
    for (size_t j = 0; j < count;) {
      const size_t cell = owner[j];
      V sum = logit(j);
      for (++j; j < count && owner[j] == cell; ++j) sum = hn::Add(sum, logit(j));
      hn::Store(hn::Add(sum, hn::Load(d, sums + cell * kQueries + v)), d, sums + cell * kQueries + v);
    }
    for (size_t r = 0; r < job.cells; ++r) {
      const V whole = hn::Load(d, cells + r * kQueries + v);
      const V taken = hn::NegMulAdd(hn::Set(d, left.listed[r]), whole, hn::Load(d, sums + r * kQueries + v));
      const V share = hn::Set(d, left.rest[r] > 0 ? -1.0f / left.rest[r] : 0.0f);
      hn::Store(hn::Add(hn::MulAdd(taken, share, whole), hn::Set(d, left.log_rest[r])), d, cells + r * kQueries + v);
    }
  }
}

// scores[j][16] += bias of the token at places[j], which are `row` floats apart.
HWY_INLINE void AddBias(const float* bias, const uint32_t* places, uint32_t row, size_t count,
                        float* HWY_RESTRICT scores) {
  const D d;
  for (size_t j = 0; j < count; ++j) {
    const V more = hn::Set(d, bias[places[j] / row]);
    for (size_t v = 0; v < kQueries; v += kLanes) {
      hn::Store(hn::Add(hn::Load(d, scores + j * kQueries + v), more), d, scores + j * kQueries + v);
    }
  }
}

// Values weighed at a time: they stay in the first-level cache for all passes over them.
constexpr size_t kChunk = 64;
// Entries after the last place, which blocks may fetch ahead.
constexpr size_t kPlacesAhead = 32;

HWY_INLINE void Gather(const float* from, const uint32_t* places, size_t count, size_t width, size_t stride,
                       float* HWY_RESTRICT to) {
  for (size_t j = 0; j < count; ++j, to += stride) PackRow(from + places[j], width, stride, to);
}

// scores[j][16] of the keys at `places`, a block of which is gathered at a time, while the next is fetched.
HWY_INLINE void GatherScores(const float* qt, const float* keys, const uint32_t* places, size_t count, size_t width,
                             size_t stride, float* HWY_RESTRICT gathered, float* HWY_RESTRICT scores) {
  size_t j = 0;
  if (width == 64) {
    for (; j + kKeyBlock <= count; j += kKeyBlock) {
      Gather(keys, places + j, kKeyBlock, 64, 64, gathered);
      ScoreBlock<kKeyBlock, true>(qt, gathered, 64, 64, scores + j * kQueries, kQueries, keys,
                                  places + j + kKeyBlock);
    }
  }
  for (; j < count; j += kKeyBlock) {
    const size_t some = std::min(kKeyBlock, count - j);
    Gather(keys, places + j, some, width, stride, gathered);
    Scores<true>(qt, gathered, stride, width, some, scores + j * kQueries);
  }
}

// Softmax of a tile over listed keys and cells. On entry logits, on exit weights: scores [count][16], cells [R][16];
// shares [16]: what makes them sum to 1. sums: scratch [R][16].
template <bool kSized>
HWY_NOINLINE void WeighTile(const SparseJob& job, size_t count, const uint16_t* owner, const Rest& left,
                            float* HWY_RESTRICT scores, float* HWY_RESTRICT cells, float* HWY_RESTRICT sums,
                            float* HWY_RESTRICT shares) {
  const SparseSettings& s = job.settings;
  const D d;
  const size_t rows = count + job.cells;
  for (size_t v = 0; v < kQueries; v += kLanes) {
    V top = hn::Load(d, scores + v);
    for (size_t j = 1; j < rows; ++j) top = hn::Max(top, hn::Load(d, scores + j * kQueries + v));
    V total = hn::Zero(d);
    for (size_t r = 0; r < job.cells; ++r) {
      const float rest = left.rest[r];
      const V weight = Exp2(hn::Sub(hn::Load(d, cells + r * kQueries + v), top));
      total = hn::Add(total, rest > 0 ? weight : hn::Zero(d));
      // Each of the rest has this share. The cell's mean value stands for all its tokens, so those that were selected
      // must give their share back.
      const V share = hn::Mul(weight, hn::Set(d, rest > 0 ? 1.0f / rest : 0.0f));
      hn::Store(share, d, sums + r * kQueries + v);
      hn::Store(hn::Mul(share, hn::Set(d, left.whole[r])), d, cells + r * kQueries + v);
    }
    for (size_t j = 0; j < s.prefix_keys; ++j) {
      const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
      total = hn::Add(total, weight);
      hn::Store(weight, d, scores + j * kQueries + v);
    }
    V other = hn::Zero(d);
    const auto weigh = [&](size_t j, V* sum) {
      const V weight = Exp2(hn::Sub(hn::Load(d, scores + j * kQueries + v), top));
      *sum = hn::Add(*sum, weight);
      const size_t key = j - s.prefix_keys;
      const V back = job.cells ? hn::Load(d, sums + owner[key] * kQueries + v) : hn::Zero(d);
      const V own = kSized && job.cells ? hn::NegMulAdd(hn::Set(d, left.sizes[key]), back, weight)
                                        : hn::Sub(weight, back);
      hn::Store(own, d, scores + j * kQueries + v);
    };
    size_t j = s.prefix_keys;
    for (; j + 2 <= count; j += 2) {
      weigh(j, &total);
      weigh(j + 1, &other);
    }
    if (j < count) weigh(j, &other);
    total = hn::Add(total, other);
    hn::Store(hn::Div(hn::Set(d, 1.0f), total), d, shares + v);
  }
}

// Which cell each listed key lies in, and how many of each cell's keys are listed. number: [4][R], of which the first row
// is the result: counting in turn spares each addition the wait for the one before.
HWY_INLINE void CountListed(const SparseJob& job, const List& list, size_t count, uint16_t* HWY_RESTRICT owner,
                            uint32_t* HWY_RESTRICT number) {
  const uint32_t most = static_cast<uint32_t>(list.limit - 1);
  std::memset(number, 0, 4 * job.cells * sizeof(uint32_t));
  for (size_t j = 0; j < count; ++j) {
    owner[j] = job.cell_of[std::min(static_cast<uint32_t>(list.patches[j]), most)];
    ++number[j % 4 * job.cells + owner[j]];
  }
  for (size_t r = 0; r < job.cells; ++r) {
    number[r] += number[job.cells + r] + number[2 * job.cells + r] + number[3 * job.cells + r];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sparsifiner
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

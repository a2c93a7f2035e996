// Operators for inference runtimes: each reads its attributes and tensors, checks their shapes, and makes a call of the
// C interface. The code is the same for ONNX Runtime and OpenVINO.
//
// A runtime supplies three types:
//   - Attributes, with Whole (an integer attribute) and Number (a float attribute),
//   - Tensors, derived from Packing, with Input, IsHalf and problem,
//   - Session, with Fill, which allocates an output of a given shape and runs a call that writes it.

#ifndef SPARSIFINER_OPERATORS_H_
#define SPARSIFINER_OPERATORS_H_

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>

#include "sparsifiner.h"

namespace sparsifiner {

inline constexpr int64_t kMost = int64_t{1} << 31;  // exclusive upper bound of sizes and attributes

// Shape of a tensor. Axes after the first kAxes are not stored.
struct Shape {
  static constexpr size_t kAxes = 8;
  size_t rank = 0;
  int64_t axes[kAxes] = {};
};

// Text of a shape for error messages.
struct Text {
  explicit Text(const Shape& shape) {
    size_t end = static_cast<size_t>(std::snprintf(text, sizeof(text), "["));
    for (size_t i = 0; i < std::min(shape.rank, Shape::kAxes); ++i) {
      end += static_cast<size_t>(
          std::snprintf(text + end, sizeof(text) - end, "%s%" PRId64, i ? ", " : "", shape.axes[i]));
    }
    std::snprintf(text + end, sizeof(text) - end, shape.rank > Shape::kAxes ? ", ...]" : "]");
  }
  char text[24 * Shape::kAxes];
};

// Base of the runtimes' `Tensors` classes (curiously recurring template: Self is the derived class).
template <typename Self>
class Packing {
 public:
  // Reads input 0 (queries, keys and values) and input 1 (sizes of the tokens); in->num_heads must be set.
  bool Pack(sparsifiner_qkv* in) const { return PackBare(in) && Sizes(1, in->batch, in->tokens, &in->sizes); }

  // Reads input 0 only.
  bool PackBare(sparsifiner_qkv* in) const {
    Shape shape;
    if (!self().Input(0, &shape, &in->qkv)) return false;
    const int64_t* axes = shape.axes;
    if (shape.rank != 3 || axes[2] <= 0 || axes[2] % (3 * in->num_heads) != 0) {
      return self().problem()->Refuse("qkv must have shape [B, N, 3 * num_heads * d], got %s", Text(shape).text);
    }
    int64_t places = 0;
    if (axes[1] >= kMost || __builtin_mul_overflow(axes[1], axes[2], &places) || places > int64_t{UINT32_MAX}) {
      return self().problem()->Refuse("qkv of shape %s is too large for 32-bit places", Text(shape).text);
    }
    in->batch = axes[0];
    in->tokens = axes[1];
    in->width = axes[2] / (3 * in->num_heads);
    return true;
  }

  // Reads the sizes of the tokens.
  bool Sizes(size_t index, int64_t batch, int64_t tokens, sparsifiner_floats* sizes) const {
    Shape shape;
    if (!self().Input(index, &shape, sizes)) return false;
    if (shape.rank == 2 && shape.axes[0] == batch && shape.axes[1] == tokens) return true;
    return self().problem()->Refuse("sizes must have shape [%" PRId64 ", %" PRId64 "], got %s", batch, tokens,
                            Text(shape).text);
  }

 private:
  const Self& self() const { return static_cast<const Self&>(*this); }
};

// Returns the number of query tiles.
inline int64_t Tiles(const sparsifiner_qkv& in, int64_t prefix, int64_t tile) { return (in.tokens - prefix + tile - 1) / tile; }

// Kernels of the operators. Read is called once; Compute may be called from several threads at a time. Both return
// false on failure, and record the reason in the Problem unless memory ran out.
struct DenseKernel {
  template <typename Attributes>
  bool Read(const Attributes& from) {
    return from.Whole("num_heads", 1, &qkv.num_heads) && from.Number("scale", &qkv.scale);
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    sparsifiner_qkv in = qkv;
    if (!tensors.Pack(&in)) return false;
    return session->Fill(tensors, {in.batch, in.tokens, in.num_heads * in.width},
                         [&](auto* call, auto to) { return sparsifiner_dense_attention(call, &in, to); });
  }

  sparsifiner_qkv qkv{};
};

struct CachedKernel {
  template <typename Attributes>
  bool Read(const Attributes& from) {
    return from.Whole("num_heads", 1, &qkv.num_heads) && from.Number("scale", &qkv.scale);
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    auto* problem = tensors.problem();
    sparsifiner_qkv in = qkv;
    sparsifiner_cache cache{};
    cache.halves = tensors.IsHalf(1);
    Shape rows, counts;
    if (!tensors.PackBare(&in) || !tensors.Input(1, &rows, &cache.cache) || !tensors.Input(2, &counts, &cache.counts)) {
      return false;
    }
    cache.tokens = rows.rank == 3 ? rows.axes[1] : 0;
    const Shape expected{3, {in.batch, cache.tokens, 2 * in.num_heads * in.width}};
    if (rows.rank != 3 || !std::equal(expected.axes, expected.axes + 3, rows.axes) || counts.rank != 2 ||
        !std::equal(expected.axes, expected.axes + 2, counts.axes)) {
      return problem->Refuse("cache must have shape [B, S, 2 * num_heads * d] and counts [B, S], got %s and %s",
                             Text(rows).text, Text(counts).text);
    }
    return session->Fill(tensors, {in.batch, in.tokens, in.num_heads * in.width},
                         [&](auto* call, auto to) { return sparsifiner_cached_attention(call, &in, &cache, to); });
  }

  sparsifiner_qkv qkv{};
};

struct SparseKernel {
  template <typename Attributes>
  bool Read(const Attributes& from) {
    return from.Whole("num_heads", 1, &qkv.num_heads) && from.Number("scale", &qkv.scale) &&
           from.Whole("num_prefix", 0, &settings.num_prefix) && from.Whole("tile", 1, &settings.tile) &&
           from.Whole("key_pool", 0, &settings.key_pool) && from.Whole("prefix_keys", 0, &settings.prefix_keys);
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    auto* problem = tensors.problem();
    sparsifiner_qkv in = qkv;
    sparsifiner_attend attend = settings;
    Shape shape;
    sparsifiner_ints indices{};
    if (!tensors.Pack(&in) || !tensors.Input(2, &shape, &indices)) return false;
    const Shape expected{3, {in.batch, in.num_heads, Tiles(in, settings.num_prefix, settings.tile)}};
    attend.keys = shape.rank == 4 ? shape.axes[3] : 0;
    // Without patches there is no expected shape; the C interface rejects that case.
    if (in.tokens > settings.num_prefix &&
        (attend.keys < 1 || !std::equal(expected.axes, expected.axes + 3, shape.axes))) {
      return problem->Refuse("indices must have shape %s and K, got %s", Text(expected).text, Text(shape).text);
    }
    return session->Fill(tensors, {in.batch, in.tokens, in.num_heads * in.width}, [&](auto* call, auto to) {
      return sparsifiner_sparse_attention(call, &in, &attend, indices, to);
    });
  }

  sparsifiner_qkv qkv{};
  sparsifiner_attend settings{};
};

struct SelectKernel {
  template <typename Attributes>
  bool Read(const Attributes& from) {
    return from.Whole("num_heads", 1, &qkv.num_heads) && from.Number("scale", &qkv.scale) &&
           from.Whole("num_prefix", 0, &settings.num_prefix) && from.Whole("query_pool", 1, &settings.query_pool) &&
           from.Whole("tile", 1, &settings.tile) && from.Whole("key_pool", 0, &settings.key_pool) &&
           from.Whole("keys", 1, &settings.keys) && from.Number("value_power", &settings.value_power);
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    auto* problem = tensors.problem();
    sparsifiner_qkv in = qkv;
    sparsifiner_select select = settings;
    Shape shape, other;
    sparsifiner_floats proj_q{}, proj_k{};
    if (!tensors.Pack(&in) || !tensors.Input(2, &shape, &proj_q) || !tensors.Input(3, &other, &proj_k)) return false;
    if (shape.rank != 3 || other.rank != 3 || !std::equal(shape.axes, shape.axes + 3, other.axes) ||
        shape.axes[0] != in.num_heads || shape.axes[1] != in.width || shape.axes[2] < 1) {
      return problem->Refuse("proj_q and proj_k must have shape [num_heads, d, c], got %s and %s", Text(shape).text,
                             Text(other).text);
    }
    select.channels = shape.axes[2];
    const int64_t tiles = Tiles(in, settings.num_prefix, settings.tile);
    return session->Fill(tensors, {in.batch, in.num_heads, tiles, settings.keys}, [&](auto* call, auto to) {
      return sparsifiner_key_select(call, &in, &select, proj_q, proj_k, to);
    });
  }

  sparsifiner_qkv qkv{};
  sparsifiner_select settings{};
};

struct MatchKernel {
  template <typename Attributes>
  bool Read(const Attributes& from) {
    qkv.scale = 1.0f;
    return from.Whole("num_heads", 1, &qkv.num_heads) && from.Whole("num_prefix", 0, &settings.num_prefix) &&
           from.Whole("window", 2, &settings.window) && from.Whole("merged", 1, &settings.merged);
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    sparsifiner_qkv in = qkv;
    if (!tensors.Pack(&in)) return false;
    return session->Fill(tensors, {in.batch, in.tokens - settings.merged, 2},
                         [&](auto* call, auto to) { return sparsifiner_match_tokens(call, &in, &settings, to); });
  }

  sparsifiner_qkv qkv{};
  sparsifiner_match settings{};
};

struct MergeKernel {
  template <typename Attributes>
  bool Read(const Attributes&) {
    return true;
  }

  template <typename Tensors, typename Session>
  bool Compute(const Tensors& tensors, Session* session) const {
    auto* problem = tensors.problem();
    sparsifiner_pairs in{};
    Shape tokens, shape;
    if (!tensors.Input(0, &tokens, &in.x)) return false;
    if (tokens.rank != 3) return problem->Refuse("x must have shape [B, N, C], got %s", Text(tokens).text);
    in.batch = tokens.axes[0], in.tokens = tokens.axes[1], in.channels = tokens.axes[2];
    if (!tensors.Sizes(1, in.batch, in.tokens, &in.sizes) || !tensors.Input(2, &shape, &in.pairs)) return false;
    if (shape.rank != 3 || shape.axes[0] != in.batch || shape.axes[2] != 2) {
      return problem->Refuse("pairs must have shape [%" PRId64 ", M, 2], got %s", in.batch, Text(shape).text);
    }
    in.merged_tokens = shape.axes[1];
    return session->Fill(tensors, {in.batch, in.merged_tokens, in.channels},
                         [&](auto* call, auto to) { return sparsifiner_merge_tokens(call, &in, to); });
  }
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_OPERATORS_H_

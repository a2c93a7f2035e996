// C interface (sparsifiner.h): validates the arguments against the specification and calls the kernels.

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "call.h"
#include "kernels.h"
#include "scratch.h"
#include "sparsifiner.h"

namespace sparsifiner {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // exclusive upper bound of sizes and attributes

// Validates a call and holds its status. Checks may continue after a failure: only the first one is reported.
class Answer {
 public:
  // asks: the call is a dry run, which validates and computes nothing.
  Answer(sparsifiner_call* call, bool asks) : call_(call), asks_(asks) {
    if (call->version != SPARSIFINER_VERSION) {
      Tell(SPARSIFINER_WRONG_VERSION, "the header has version %" PRId32 ", the library has version %d", call->version,
           SPARSIFINER_VERSION);
      return;
    }
    attention_ = FindAttention(call->precision);
    Require(attention_ != nullptr, "%s has no precision %" PRId32, sparsifiner_target(), call->precision);
  }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  sparsifiner_status status() const { return status_; }
  bool well() const { return status_ == SPARSIFINER_OK; }
  bool computes() const { return well() && !asks_; }
  // Kernels of the requested precision; null only if the call was rejected.
  const Attention* attention() const { return attention_; }

  [[gnu::format(printf, 3, 4)]] void Require(bool met, const char* format, ...) {
    if (met || !well()) return;
    va_list values;
    va_start(values, format);
    status_ = SPARSIFINER_INVALID_ARGUMENT;
    std::vsnprintf(call_->message, sizeof(call_->message), format, values);
    va_end(values);
  }

  // Returns the status after a kernel: `done` is false if it ran out of memory.
  sparsifiner_status Of(bool done) {
    if (!done) Tell(SPARSIFINER_OUT_OF_MEMORY, "out of memory");
    return status_;
  }

  // Returns a checked integer, or `least` if it is rejected, so that later checks can continue.
  size_t Whole(const char* name, int64_t value, int64_t least) {
    const bool fits = value >= least && value < kMost;
    Require(fits, "%s is %" PRId64, name, value);
    return static_cast<size_t>(fits ? value : least);
  }

  float Number(const char* name, float value) {
    Require(std::isfinite(value) && value >= 0, "%s is %f", name, static_cast<double>(value));
    return value;
  }

  // Requires that a tensor has `wanted` elements and, unless this is a dry run, a data pointer.
  template <class Tensor>
  void Input(const char* name, const Tensor& tensor, size_t wanted) {
    Require(tensor.count >= 0 && static_cast<size_t>(tensor.count) == wanted, "%s has %" PRId64 " elements, not %zu", name,
            tensor.count, wanted);
    Require(asks_ || tensor.data != nullptr || wanted == 0, "%s is null", name);
  }

  // roundable: the output may be bfloat16.
  void Output(const char* name, const sparsifiner_output& tensor, size_t wanted, bool roundable = false) {
    if (!asks_) Input(name, tensor, wanted);
    Require(tensor.rounded == 0 || (roundable && tensor.rounded == 1), "%s: rounded is %" PRId64, name, tensor.rounded);
  }

 private:
  template <class... Values>
  void Tell(sparsifiner_status status, const char* format, Values... values) {
    Require(false, format, values...);
    status_ = status;
  }

  sparsifiner_call* call_;
  bool asks_;
  const Attention* attention_ = nullptr;
  sparsifiner_status status_ = SPARSIFINER_OK;
};

// Validates queries, keys and values. sized: they come with sizes of the tokens.
Packed Checked(const sparsifiner_qkv& in, size_t prefix, Answer* answer, bool sized = true) {
  const Packed packed{in.qkv.data,
                      answer->Whole("batch", in.batch, 0),
                      answer->Whole("tokens", in.tokens, 0),
                      answer->Whole("num_heads", in.num_heads, 1),
                      answer->Whole("width", in.width, 1),
                      answer->Number("scale", in.scale),
                      in.sizes.data};
  answer->Require(packed.tokens > prefix, "%zu tokens leave no patch after %zu prefix tokens", packed.tokens, prefix);
  answer->Require(Times(Times(packed.tokens, 3), Times(packed.heads, packed.width)) <= UINT32_MAX,
                  "%zu tokens of %zu heads and %zu channels are too large for 32-bit places", packed.tokens, packed.heads,
                  packed.width);
  answer->Input("qkv", in.qkv, packed.batch * packed.tokens * packed.Row());
  answer->Input("sizes", in.sizes, sized ? packed.batch * packed.tokens : 0);
  return packed;
}

// Drops the sizes if all are 1, since attention and selection are faster without them.
Packed Attended(Packed in) {
  const float* end = in.sizes + in.batch * in.tokens;
  if (std::all_of(in.sizes, end, [](float size) { return size == 1.0f; })) in.sizes = nullptr;
  return in;
}

Output Place(const sparsifiner_output& output) { return {output.data, output.rounded != 0}; }

SelectSettings Checked(const sparsifiner_select& options, Answer* answer) {
  const SelectSettings settings{answer->Whole("num_prefix", options.num_prefix, 0),
                                answer->Whole("query_pool", options.query_pool, 1),
                                answer->Whole("tile", options.tile, 1),
                                answer->Whole("key_pool", options.key_pool, 0),
                                answer->Whole("keys", options.keys, 1),
                                answer->Whole("channels", options.channels, 1),
                                answer->Number("value_power", options.value_power)};
  answer->Require(settings.tile % settings.query_pool == 0, "tile is not a multiple of query_pool");
  return settings;
}

SparseSettings Checked(const sparsifiner_attend& options, Answer* answer) {
  SparseSettings settings{answer->Whole("num_prefix", options.num_prefix, 0),
                          answer->Whole("prefix_keys", options.prefix_keys, 0), answer->Whole("tile", options.tile, 1),
                          answer->Whole("key_pool", options.key_pool, 0), answer->Whole("keys", options.keys, 1)};
  const bool single = settings.tile == 1 && settings.key_pool == 0;
  answer->Require(settings.prefix_keys <= 1, "prefix_keys must be 0 or 1");
  answer->Require(settings.prefix_keys == 1 || single, "prefix_keys 0 requires tile 1 and key_pool 0");
  if (settings.prefix_keys == 1) settings.prefix_keys = settings.prefix;  // from here on a number
  return settings;
}

MatchSettings Checked(const sparsifiner_match& options, Answer* answer) {
  const MatchSettings settings{answer->Whole("num_prefix", options.num_prefix, 0),
                               answer->Whole("window", options.window, 2), answer->Whole("merged", options.merged, 1)};
  answer->Require(settings.window % 2 == 0, "window %zu is odd", settings.window);
  return settings;
}

// Returns the number of elements in the key lists of all tiles.
template <class Settings>
size_t Lists(const Packed& in, const Settings& settings) {
  const size_t tiles = Groups(in.tokens - settings.prefix, settings.tile);
  return Times(Times(in.batch * in.heads, tiles), settings.keys);
}

}  // namespace
}  // namespace sparsifiner

using namespace sparsifiner;

extern "C" {

int32_t sparsifiner_version(void) { return SPARSIFINER_VERSION; }

int sparsifiner_has_bfloat16(void) { return FindAttention(SPARSIFINER_BFLOAT16) != nullptr; }

void sparsifiner_hold_memory(int holds) { IdleMemory::Hold(holds); }

// Each function checks the version before it reads a structure, whose layout depends on the version.

sparsifiner_status sparsifiner_key_select(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                          const sparsifiner_select* options, sparsifiner_floats proj_q,
                                          sparsifiner_floats proj_k, sparsifiner_output indices) {
  Answer answer(call, indices.data == nullptr);
  if (!answer.well()) return answer.status();
  const SelectSettings settings = Checked(*options, &answer);
  const Packed in = Checked(*qkv, settings.prefix, &answer);
  answer.Require(settings.keys <= in.tokens - settings.prefix, "keys exceed the patches");
  const size_t projected = Times(Times(in.heads, in.width), settings.channels);
  answer.Input("proj_q", proj_q, projected);
  answer.Input("proj_k", proj_k, projected);
  answer.Output("indices", indices, Lists(in, settings));
  if (!answer.computes()) return answer.status();
  auto* to = static_cast<int32_t*>(indices.data);
  return answer.Of(KeySelect(Attended(in), proj_q.data, proj_k.data, settings, to, Call(*call)));
}

sparsifiner_status sparsifiner_sparse_attention(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                                const sparsifiner_attend* options, sparsifiner_ints indices,
                                                sparsifiner_output output) {
  Answer answer(call, output.data == nullptr);
  if (!answer.well()) return answer.status();
  const SparseSettings settings = Checked(*options, &answer);
  const Packed in = Checked(*qkv, settings.prefix, &answer);
  answer.Require(settings.keys <= in.tokens - settings.prefix_keys, "keys exceed the patches");
  answer.Require(settings.key_pool == 0 || Groups(in.tokens - settings.prefix, settings.key_pool) <= 65535,
                 "more than 65535 pools");
  // Packing pads each row to whole vectors (up to 31 more channels). Rows of background tokens come after the others.
  answer.Require(Times(in.tokens, in.width + 31) <= UINT32_MAX, "%zu tokens are too many for 32-bit places", in.tokens);
  answer.Input("indices", indices, Lists(in, settings));
  answer.Output("output", output, in.batch * in.tokens * in.heads * in.width, /*roundable=*/true);
  if (!answer.computes()) return answer.status();
  const bool single = settings.tile == 1 && settings.key_pool == 0;
  const Attention* attention = single ? FindAttention(SPARSIFINER_FLOAT32) : answer.attention();
  return answer.Of(attention->sparse(Attended(in), indices.data, settings, Place(output), Call(*call)));
}

sparsifiner_status sparsifiner_dense_attention(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                               sparsifiner_output output) {
  Answer answer(call, output.data == nullptr);
  if (!answer.well()) return answer.status();
  const Packed in = Checked(*qkv, 0, &answer);
  answer.Output("output", output, in.batch * in.tokens * in.heads * in.width, /*roundable=*/true);
  if (!answer.computes()) return answer.status();
  return answer.Of(answer.attention()->dense(Attended(in), Cache{}, Place(output), Call(*call)));
}

sparsifiner_status sparsifiner_cached_attention(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                                const sparsifiner_cache* from, sparsifiner_output output) {
  Answer answer(call, output.data == nullptr);
  if (!answer.well()) return answer.status();
  Packed in = Checked(*qkv, 0, &answer, /*sized=*/false);
  in.sizes = nullptr;
  const size_t halves = answer.Whole("halves", from->halves, 0);
  answer.Require(halves <= 1, "halves is %zu, not 0 or 1", halves);
  const Cache cache{from->cache.data, from->counts.data, answer.Whole("cached tokens", from->tokens, 1), halves != 0};
  const size_t tokens = Times(in.batch, cache.tokens), channels = in.heads * in.width;
  answer.Input("cache", from->cache, Times(tokens, 2 * channels));
  answer.Input("counts", from->counts, tokens);
  answer.Output("output", output, in.batch * in.tokens * channels, /*roundable=*/true);
  if (!answer.computes()) return answer.status();
  return answer.Of(answer.attention()->dense(in, cache, Place(output), Call(*call)));
}

sparsifiner_status sparsifiner_match_tokens(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                            const sparsifiner_match* options, sparsifiner_output pairs) {
  Answer answer(call, pairs.data == nullptr);
  if (!answer.well()) return answer.status();
  const MatchSettings settings = Checked(*options, &answer);
  const Packed in = Checked(*qkv, settings.prefix, &answer);
  const size_t patches = in.tokens - settings.prefix;
  answer.Require(settings.merged <= patches / 2, "merged %zu exceeds half of the %zu patches", settings.merged, patches);
  answer.Output("pairs", pairs, in.batch * (in.tokens - settings.merged) * 2);
  if (!answer.computes()) return answer.status();
  return answer.Of(MatchTokens(in, settings, static_cast<int32_t*>(pairs.data), Call(*call)));
}

sparsifiner_status sparsifiner_merge_tokens(sparsifiner_call* call, const sparsifiner_pairs* input,
                                            sparsifiner_output output) {
  Answer answer(call, output.data == nullptr);
  if (!answer.well()) return answer.status();
  const Merging in{input->x.data,
                   input->sizes.data,
                   input->pairs.data,
                   answer.Whole("batch", input->batch, 0),
                   answer.Whole("tokens", input->tokens, 1),
                   answer.Whole("channels", input->channels, 0),
                   answer.Whole("merged_tokens", input->merged_tokens, 1)};
  answer.Require(in.count <= in.tokens, "%zu pairs of %zu tokens", in.count, in.tokens);
  const size_t tokens = in.batch * in.tokens, rows = in.batch * in.count;
  answer.Input("x", input->x, Times(tokens, in.channels));
  answer.Input("sizes", input->sizes, tokens);
  answer.Input("pairs", input->pairs, Times(rows, 2));
  answer.Output("output", output, Times(rows, in.channels));
  if (!answer.computes()) return answer.status();
  return answer.Of(MergeTokens(in, static_cast<float*>(output.data), Call(*call)));
}

}  // extern "C"

// The C interface (sparsifiner.h): refuses what the operators' specification refuses, and calls the kernels.

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

constexpr int64_t kMost = int64_t{1} << 31;  // no size or attribute reaches this

// A call's answer. What checks return is whether things are well; the first problem is told.
class Answer {
 public:
  explicit Answer(sparsifiner_call* call) : call_(call) {
    if (call->version != SPARSIFINER_VERSION) {
      Tell(SPARSIFINER_WRONG_VERSION, "header of version %" PRId32 ", library of version %d", call->version,
           SPARSIFINER_VERSION);
    } else if (call->precision != SPARSIFINER_FLOAT32 && call->precision != SPARSIFINER_BFLOAT16) {
      Refuse("precision is %" PRId32, call->precision);
    } else if (call->precision == SPARSIFINER_BFLOAT16 && !HasBf16()) {
      Refuse("%s has no bfloat16", TargetName());
    }
  }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  sparsifiner_status status() const { return status_; }
  bool well() const { return status_ == SPARSIFINER_OK; }

  [[gnu::format(printf, 2, 3)]] bool Refuse(const char* format, ...) {
    va_list values;
    va_start(values, format);
    Write(SPARSIFINER_INVALID_ARGUMENT, format, values);
    va_end(values);
    return false;
  }

  // The answer, if the kernel is `done`, or lacked memory.
  sparsifiner_status Of(bool done) {
    if (!done) Tell(SPARSIFINER_OUT_OF_MEMORY, "out of memory");
    return status_;
  }

  bool Whole(const char* name, int64_t value, int64_t least, size_t* number) {
    *number = static_cast<size_t>(value);
    return (value >= least && value < kMost) || Refuse("%s is %" PRId64, name, value);
  }

  bool Number(const char* name, float value) {
    return (std::isfinite(value) && value >= 0) || Refuse("%s is %f", name, static_cast<double>(value));
  }

  // Whether a tensor has so many elements, and is there, but in a call that only asks.
  bool Given(const char* name, const void* data, int64_t count, size_t wanted, bool asks) {
    if (count < 0 || static_cast<size_t>(count) != wanted) {
      return Refuse("%s has %" PRId64 " elements, not %zu", name, count, wanted);
    }
    return asks || data != nullptr || wanted == 0 || Refuse("%s is null", name);
  }

 private:
  [[gnu::format(printf, 3, 4)]] void Tell(sparsifiner_status status, const char* format, ...) {
    va_list values;
    va_start(values, format);
    Write(status, format, values);
    va_end(values);
  }

  void Write(sparsifiner_status status, const char* format, va_list values) {
    if (!well()) return;
    status_ = status;
    std::vsnprintf(call_->message, sizeof(call_->message), format, values);
  }

  sparsifiner_call* call_;
  sparsifiner_status status_ = SPARSIFINER_OK;
};

size_t Groups(size_t count, size_t each) { return (count + each - 1) / each; }

bool Check(const sparsifiner_qkv& in, size_t prefix, bool asks, Answer* answer, Packed* packed) {
  if (!answer->Whole("batch", in.batch, 0, &packed->batch) || !answer->Whole("tokens", in.tokens, 0, &packed->tokens) ||
      !answer->Whole("num_heads", in.num_heads, 1, &packed->heads) ||
      !answer->Whole("width", in.width, 1, &packed->width) || !answer->Number("scale", in.scale)) {
    return false;
  }
  if (packed->tokens <= prefix) {
    return answer->Refuse("%zu tokens leave no patch after %zu prefix tokens", packed->tokens, prefix);
  }
  if (Times(Times(packed->tokens, 3), Times(packed->heads, packed->width)) > UINT32_MAX) {
    return answer->Refuse("%zu tokens of %zu heads and %zu channels are too large for 32-bit places", packed->tokens,
                          packed->heads, packed->width);
  }
  packed->qkv = in.qkv.data;
  packed->sizes = in.sizes.data;
  packed->scale = in.scale;
  const size_t tokens = packed->batch * packed->tokens;
  return answer->Given("qkv", in.qkv.data, in.qkv.count, tokens * packed->Row(), asks) &&
         answer->Given("sizes", in.sizes.data, in.sizes.count, tokens, asks);
}

// The same where no token was merged: attention and selection take a shorter way without sizes.
Packed Attended(Packed in) {
  const float* end = in.sizes + in.batch * in.tokens;
  if (std::all_of(in.sizes, end, [](float size) { return size == 1.0f; })) in.sizes = nullptr;
  return in;
}

bool Check(const sparsifiner_select& given, const sparsifiner_qkv& qkv, bool asks, Answer* answer, Packed* in,
           SelectSettings* settings) {
  if (!answer->Whole("num_prefix", given.num_prefix, 0, &settings->prefix) ||
      !answer->Whole("probe", given.probe, 1, &settings->probe) ||
      !answer->Whole("tile", given.tile, 1, &settings->tile) ||
      !answer->Whole("cell", given.cell, 0, &settings->cell) ||
      !answer->Whole("keys", given.keys, 1, &settings->keys) ||
      !answer->Whole("channels", given.channels, 1, &settings->channels) ||
      !answer->Number("value_power", given.value_power)) {
    return false;
  }
  settings->value_power = given.value_power;
  if (settings->tile % settings->probe != 0) return answer->Refuse("tile is not a multiple of probe");
  if (!Check(qkv, settings->prefix, asks, answer, in)) return false;
  return settings->keys <= in->tokens - settings->prefix || answer->Refuse("keys exceed the patches");
}

bool Check(const sparsifiner_attend& given, const sparsifiner_qkv& qkv, bool asks, Answer* answer, Packed* in,
           SparseSettings* settings) {
  if (!answer->Whole("num_prefix", given.num_prefix, 0, &settings->prefix) ||
      !answer->Whole("tile", given.tile, 1, &settings->tile) ||
      !answer->Whole("cell", given.cell, 0, &settings->cell) ||
      !answer->Whole("prefix_keys", given.prefix_keys, 0, &settings->prefix_keys) ||
      !answer->Whole("keys", given.keys, 1, &settings->keys)) {
    return false;
  }
  if (settings->prefix_keys > 1) return answer->Refuse("prefix_keys must be 0 or 1");
  if (settings->prefix_keys == 0 && (settings->tile != 1 || settings->cell != 0)) {
    return answer->Refuse("prefix_keys 0 goes with tile 1 and cell 0");
  }
  if (settings->prefix_keys == 1) settings->prefix_keys = settings->prefix;
  if (!Check(qkv, settings->prefix, asks, answer, in)) return false;
  if (settings->keys > in->tokens - settings->prefix_keys) return answer->Refuse("keys exceed the patches");
  if (settings->cell != 0 && Groups(in->tokens - settings->prefix, settings->cell) > 65535) {
    return answer->Refuse("more than 65535 cells");
  }
  // Rows that are narrower than a vector grow where they are packed.
  return Times(in->tokens, in->width + 15) <= UINT32_MAX ||
         answer->Refuse("%zu tokens are too many for 32-bit places", in->tokens);
}

bool Check(const sparsifiner_match& given, const sparsifiner_qkv& qkv, bool asks, Answer* answer, Packed* in,
           MatchSettings* settings) {
  if (!answer->Whole("num_prefix", given.num_prefix, 0, &settings->prefix) ||
      !answer->Whole("window", given.window, 2, &settings->window) ||
      !answer->Whole("merged", given.merged, 1, &settings->merged)) {
    return false;
  }
  if (settings->window % 2 != 0) return answer->Refuse("window %zu is odd", settings->window);
  if (!Check(qkv, settings->prefix, asks, answer, in)) return false;
  const size_t patches = in->tokens - settings->prefix;
  return settings->merged <= patches / 2 ||
         answer->Refuse("merged %zu exceeds half of the %zu patches", settings->merged, patches);
}

// Elements of the lists that tiles have.
template <class Settings>
size_t Lists(const Packed& in, const Settings& settings) {
  const size_t tiles = Groups(in.tokens - settings.prefix, settings.tile);
  return Times(Times(in.batch * in.heads, tiles), settings.keys);
}

// Whether the output of attention has room for every row.
bool GivenRows(const Packed& in, const sparsifiner_output& output, Answer* answer) {
  return answer->Given("output", output.data, output.count, in.batch * in.tokens * in.heads * in.width, false);
}

}  // namespace
}  // namespace sparsifiner

using sparsifiner::Answer;
using sparsifiner::Attended;
using sparsifiner::Lists;
using sparsifiner::Call;
using sparsifiner::Packed;
using sparsifiner::Times;

extern "C" {

int32_t sparsifiner_version(void) { return SPARSIFINER_VERSION; }

const char* sparsifiner_target(void) { return sparsifiner::TargetName(); }

int sparsifiner_has_bfloat16(void) { return sparsifiner::HasBf16() ? 1 : 0; }

int sparsifiner_limit_target(const char* name) { return sparsifiner::LimitTarget(name) ? 1 : 0; }

void sparsifiner_hold_memory(int holds) { sparsifiner::IdleMemory::Hold(holds); }

sparsifiner_status sparsifiner_key_select(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                          const sparsifiner_select* given, sparsifiner_floats proj_q,
                                          sparsifiner_floats proj_k, sparsifiner_output indices) {
  Answer answer(call);
  Packed in{};
  sparsifiner::SelectSettings settings{};
  const bool asks = indices.data == nullptr;
  if (!answer.well() || !Check(*given, *qkv, asks, &answer, &in, &settings)) return answer.status();
  const size_t projected = Times(Times(in.heads, in.width), settings.channels);
  if (!answer.Given("proj_q", proj_q.data, proj_q.count, projected, asks) ||
      !answer.Given("proj_k", proj_k.data, proj_k.count, projected, asks) || asks ||
      !answer.Given("indices", indices.data, indices.count, Lists(in, settings), asks)) {
    return answer.status();
  }
  auto* to = static_cast<int32_t*>(indices.data);
  return answer.Of(KeySelect(Attended(in), proj_q.data, proj_k.data, settings, to, Call(*call)));
}

sparsifiner_status sparsifiner_sparse_attention(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                                const sparsifiner_attend* given, sparsifiner_ints indices,
                                                sparsifiner_output output) {
  Answer answer(call);
  Packed in{};
  sparsifiner::SparseSettings settings{};
  const bool asks = output.data == nullptr;
  if (!answer.well() || !Check(*given, *qkv, asks, &answer, &in, &settings) ||
      !answer.Given("indices", indices.data, indices.count, Lists(in, settings), asks) || asks ||
      !GivenRows(in, output, &answer)) {
    return answer.status();
  }
  const bool halves = call->precision == SPARSIFINER_BFLOAT16 && (settings.tile != 1 || settings.cell != 0);
  const auto attend = halves ? sparsifiner::SparseAttentionBf16 : sparsifiner::SparseAttention;
  return answer.Of(attend(Attended(in), indices.data, settings, static_cast<float*>(output.data), Call(*call)));
}

sparsifiner_status sparsifiner_dense_attention(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                               sparsifiner_output output) {
  Answer answer(call);
  Packed in{};
  const bool asks = output.data == nullptr;
  if (!answer.well() || !Check(*qkv, 0, asks, &answer, &in) || asks || !GivenRows(in, output, &answer)) {
    return answer.status();
  }
  const bool halves = call->precision == SPARSIFINER_BFLOAT16;
  const auto attend = halves ? sparsifiner::DenseAttentionBf16 : sparsifiner::DenseAttention;
  return answer.Of(attend(Attended(in), static_cast<float*>(output.data), Call(*call)));
}

sparsifiner_status sparsifiner_match_tokens(sparsifiner_call* call, const sparsifiner_qkv* qkv,
                                            const sparsifiner_match* given, sparsifiner_output pairs) {
  Answer answer(call);
  Packed in{};
  sparsifiner::MatchSettings settings{};
  const bool asks = pairs.data == nullptr;
  if (!answer.well() || !Check(*given, *qkv, asks, &answer, &in, &settings) || asks ||
      !answer.Given("pairs", pairs.data, pairs.count, in.batch * (in.tokens - settings.merged) * 2, asks)) {
    return answer.status();
  }
  return answer.Of(MatchTokens(in, settings, static_cast<int32_t*>(pairs.data), Call(*call)));
}

sparsifiner_status sparsifiner_merge_tokens(sparsifiner_call* call, const sparsifiner_pairs* given,
                                            sparsifiner_output output) {
  Answer answer(call);
  sparsifiner::Merging in{given->x.data, given->sizes.data, given->pairs.data, 0, 0, 0, 0};
  const bool asks = output.data == nullptr;
  if (!answer.well() || !answer.Whole("batch", given->batch, 0, &in.batch) ||
      !answer.Whole("tokens", given->tokens, 1, &in.tokens) ||
      !answer.Whole("channels", given->channels, 0, &in.channels) ||
      !answer.Whole("merged_tokens", given->merged_tokens, 1, &in.count)) {
    return answer.status();
  }
  if (in.count > in.tokens) {
    answer.Refuse("%zu pairs of %zu tokens", in.count, in.tokens);
    return answer.status();
  }
  const size_t tokens = in.batch * in.tokens, left = in.batch * in.count;
  if (!answer.Given("x", in.x, given->x.count, Times(tokens, in.channels), asks) ||
      !answer.Given("sizes", in.sizes, given->sizes.count, tokens, asks) ||
      !answer.Given("pairs", in.pairs, given->pairs.count, Times(left, 2), asks) || asks ||
      !answer.Given("output", output.data, output.count, Times(left, in.channels), asks)) {
    return answer.status();
  }
  return answer.Of(MergeTokens(in, static_cast<float*>(output.data), Call(*call)));
}

}  // extern "C"

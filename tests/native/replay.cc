// Runs the kernels on recorded inputs, without ONNX Runtime: under sanitizers, or for another processor under emulation.
// Standard input holds records, standard output takes the raw result of each. Every buffer is its own allocation, exactly
// as long as its tensor, so that a sanitizer sees the first element touched outside. On an instruction set with bfloat16
// attention runs in it.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

using sparsifiner::Packed;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Bytes = std::unique_ptr<void, Free>;

Bytes Take(size_t bytes) {
  return Bytes(bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64));
}

// One thread, the last item first; all memory is new for each item.
class Backwards final : public sparsifiner::Parallel {
 public:
  void* Shared(size_t bytes) const override {
    shared_ = Take(bytes);
    return shared_.get();
  }
  bool For(size_t count, size_t bytes, void (*fn)(void*, size_t, void*), void* data) const override {
    for (size_t i = count; i-- > 0;) {
      const Bytes own = Take(bytes);
      if (bytes != 0 && own == nullptr) return false;
      fn(data, i, own.get());
    }
    return true;
  }

 private:
  mutable Bytes shared_;
};

template <typename T>
std::unique_ptr<T[]> Read(size_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  if (std::fread(values.get(), sizeof(T), count, stdin) != count) std::exit(3);
  return values;
}

template <typename T>
void Write(const T* values, size_t count) {
  if (std::fwrite(values, sizeof(T), count, stdout) != count) std::exit(4);
}

// What a record begins with; the tensors follow, in the schema's order.
struct Header {
  int64_t op, sized, batch, tokens, heads, width, prefix, prefix_keys, tile, probe, cell, keys, channels, window, merged;
  float scale, value_power;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !sparsifiner::LimitTarget(argv[1])) return 2;
  std::fprintf(stderr, "%s\n", sparsifiner::TargetName());
  const Backwards parallel;
  Header h;
  while (std::fread(&h, sizeof(h), 1, stdin) == 1) {
    const size_t batch = h.batch, tokens = h.tokens, heads = h.heads, width = h.width;
    if (h.op == 5) {
      const auto x = Read<float>(batch * tokens * width), sizes = Read<float>(batch * tokens);
      const auto pairs = Read<int32_t>(batch * h.keys * 2);
      std::unique_ptr<float[]> output(new float[batch * h.keys * width]);
      if (!MergeTokens({x.get(), sizes.get(), pairs.get(), batch, tokens, width, size_t(h.keys)}, output.get(), parallel)) {
        return 5;
      }
      Write(output.get(), batch * h.keys * width);
      continue;
    }
    const auto qkv = Read<float>(batch * tokens * 3 * heads * width);
    const auto sizes = Read<float>(batch * tokens);
    const Packed in{qkv.get(), batch, tokens, heads, width, h.scale, h.sized ? sizes.get() : nullptr};
    if (h.op == 4) {
      const size_t left = batch * (tokens - h.merged) * 2;
      std::unique_ptr<int32_t[]> pairs(new int32_t[left]);
      if (!MatchTokens(in, {size_t(h.prefix), size_t(h.window), size_t(h.merged)}, pairs.get(), parallel)) return 5;
      Write(pairs.get(), left);
      continue;
    }
    const size_t tiles = h.tile ? (tokens - h.prefix + h.tile - 1) / h.tile : 0;
    const size_t listed = batch * heads * tiles * h.keys, size = batch * tokens * heads * width;
    if (h.op == 2) {
      const auto proj_q = Read<float>(heads * width * h.channels), proj_k = Read<float>(heads * width * h.channels);
      std::unique_ptr<int32_t[]> lists(new int32_t[listed]);
      if (!KeySelect(in, proj_q.get(), proj_k.get(),
                     {size_t(h.prefix), size_t(h.probe), size_t(h.tile), size_t(h.cell), size_t(h.keys),
                      size_t(h.channels), h.value_power},
                     lists.get(), parallel)) {
        return 5;
      }
      Write(lists.get(), listed);
      continue;
    }
    std::unique_ptr<float[]> output(new float[size]);
    for (size_t i = 0; i < size; ++i) output[i] = std::numeric_limits<float>::quiet_NaN();
    bool done = false;
    if (h.op == 1) {
      const auto lists = Read<int32_t>(listed);
      const auto attend = sparsifiner::HasBf16() ? sparsifiner::SparseAttentionBf16 : sparsifiner::SparseAttention;
      done = attend(in, lists.get(),
                    {size_t(h.prefix), size_t(h.prefix_keys), size_t(h.tile), size_t(h.cell), size_t(h.keys)},
                    output.get(), parallel);
    } else {
      const auto attend = sparsifiner::HasBf16() ? sparsifiner::DenseAttentionBf16 : sparsifiner::DenseAttention;
      done = attend(in, output.get(), parallel);
    }
    if (!done) return 5;
    Write(output.get(), size);
  }
  return 0;
}

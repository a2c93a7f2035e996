// Runs the kernels on recorded inputs, without ONNX Runtime: under sanitizers, or for another processor under emulation.
// Standard input holds records, standard output takes the raw result of each. Every buffer is its own allocation, exactly
// as long as its tensor, so that a sanitizer sees the first element touched outside.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

using sparsifiner::Packed;

struct Backwards final : sparsifiner::Parallel {
  void For(size_t count, void (*fn)(void*, size_t), void* data) const override {
    for (size_t i = count; i-- > 0;) fn(data, i);
  }
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
  int64_t op, batch, tokens, heads, width, prefix, prefix_keys, tile, probe, cell, keys, channels;
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
    const auto qkv = Read<float>(batch * tokens * 3 * heads * width);
    const Packed in{qkv.get(), batch, tokens, heads, width, h.scale};
    const size_t tiles = h.tile ? (tokens - h.prefix + h.tile - 1) / h.tile : 0;
    const size_t listed = batch * heads * tiles * h.keys, size = batch * tokens * (h.op == 3 ? 1 : heads * width);
    if (h.op == 2) {
      const auto proj_q = Read<float>(heads * width * h.channels), proj_k = Read<float>(heads * width * h.channels);
      std::unique_ptr<int32_t[]> lists(new int32_t[listed]);
      KeySelect(in, proj_q.get(), proj_k.get(),
                {size_t(h.prefix), size_t(h.probe), size_t(h.tile), size_t(h.cell), size_t(h.keys),
                 size_t(h.channels), h.value_power},
                lists.get(), parallel);
      Write(lists.get(), listed);
      continue;
    }
    std::unique_ptr<float[]> output(new float[size]);
    for (size_t i = 0; i < size; ++i) output[i] = std::numeric_limits<float>::quiet_NaN();
    if (h.op == 1) {
      const auto lists = Read<int32_t>(listed);
      SparseAttention(in, lists.get(),
                      {size_t(h.prefix), size_t(h.prefix_keys), size_t(h.tile), size_t(h.cell), size_t(h.keys)},
                      output.get(), parallel);
    } else if (h.op == 3) {
      TokenScore(in, output.get(), parallel);
    } else {
      DenseAttention(in, output.get(), parallel);
    }
    Write(output.get(), size);
  }
  return 0;
}

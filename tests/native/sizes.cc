// Sizes beyond all memory, asked of what deals memory out: null, and in order again afterwards.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "scratch.h"

namespace {

void Expect(bool holds, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d\n", line);
  std::exit(1);
}
#define EXPECT(condition) Expect(condition, __LINE__)

}  // namespace

int main() {
  using namespace sparsifiner;
  EXPECT(Times(uint64_t{1} << 32, uint64_t{1} << 32) == SIZE_MAX);
  EXPECT(Times(uint64_t{1} << 32, uint64_t{1} << 31) == uint64_t{1} << 63);
  EXPECT(Plus(SIZE_MAX, 1) == SIZE_MAX);

  Layout fine(nullptr);
  fine.Take<uint16_t>(3, 5, 7);
  fine.Take<float>(16);
  EXPECT(fine.used() == 256 + 64);

  // Products that come out as 0 or a little in 64 bits, and sums that do.
  for (const uint64_t most : {uint64_t{1} << 31, uint64_t{1} << 32, uint64_t{1} << 62, SIZE_MAX}) {
    Layout beyond(nullptr);
    beyond.Take<float>(most, most, most);
    EXPECT(beyond.used() > PTRDIFF_MAX);
    beyond.Take<float>(most);
    EXPECT(beyond.used() > PTRDIFF_MAX);
    Scratch scratch;
    EXPECT(scratch.Reserve(beyond.used()) == nullptr);
  }
  Layout sum(nullptr);
  for (int i = 0; i < 5; ++i) sum.Take<float>(uint64_t{1} << 60);
  EXPECT(sum.used() > PTRDIFF_MAX);

  Scratch scratch;
  for (const size_t beyond : {SIZE_MAX, SIZE_MAX - 62, SIZE_MAX - 64, size_t{PTRDIFF_MAX}}) {
    void* memory = scratch.Reserve(1000);
    EXPECT(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % Scratch::kAlignment == 0);
    std::memset(memory, 1, 1000);
    EXPECT(scratch.Reserve(10) == memory);
    EXPECT(scratch.Reserve(beyond) == nullptr);
  }
  return 0;
}

// Memory that is kept for the next call, and how it is dealt out. Nothing here throws: memory that cannot be had is a
// null pointer, since an exception must not leave a function that ONNX Runtime's threads run, and throwing takes memory
// itself.

#ifndef SPARSIFINER_SCRATCH_H_
#define SPARSIFINER_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace sparsifiner {

static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");

// Product and sum, or all ones where they do not fit: more than any memory holds.
inline size_t Times(size_t a, size_t b) {
  size_t product;
  return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}
inline size_t Plus(size_t a, size_t b) {
  size_t sum;
  return __builtin_add_overflow(a, b, &sum) ? SIZE_MAX : sum;
}

// Objects whose `new (std::nothrow)` is null where memory ran out; the standard one throws inside.
struct Allocated {
  static void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
  static void operator delete(void* memory) noexcept { std::free(memory); }
  static void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
};

// Grows to the largest reservation, and is given back only as a whole.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // `bytes` (not 0) of memory, aligned to a cache line, or null; what it held before is lost.
  void* Reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = Plus(bytes, kAlignment - 1) / kAlignment * kAlignment;
      memory_ = size_ > PTRDIFF_MAX ? nullptr : std::aligned_alloc(kAlignment, size_);
      if (memory_ == nullptr) size_ = 0;
    }
    return memory_;
  }

  static constexpr size_t kAlignment = 64;

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Deals one reservation out to several arrays: first pass with a null base to measure, second to hand out.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {}

  // An array of as many elements as the product of `sizes`.
  template <typename T, typename... Sizes>
  T* Take(Sizes... sizes) {
    T* start = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    size_t bytes = sizeof(T);
    ((bytes = Times(bytes, sizes)), ...);
    used_ = Plus(used_, Plus(bytes, Scratch::kAlignment - 1) / Scratch::kAlignment * Scratch::kAlignment);
    return start;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_SCRATCH_H_

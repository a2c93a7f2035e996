// Working memory that is kept for later calls, and its division into arrays. Nothing here throws; a failed allocation
// returns null. An exception must not leave a function that runs on ONNX Runtime's threads, and throwing allocates
// memory itself.

#ifndef SPARSIFINER_SCRATCH_H_
#define SPARSIFINER_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace sparsifiner {

static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");

// Product and sum, or SIZE_MAX on overflow, which no allocation can satisfy.
inline size_t Times(size_t a, size_t b) {
  size_t product;
  return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}
inline size_t Plus(size_t a, size_t b) {
  size_t sum;
  return __builtin_add_overflow(a, b, &sum) ? SIZE_MAX : sum;
}

// Base of classes whose `new (std::nothrow)` returns null if memory runs out. The standard operator throws internally.
struct Allocated {
  static void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
  static void operator delete(void* memory) noexcept { std::free(memory); }
  static void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
};

// Buffer that grows to the largest reservation and is freed by the destructor.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Returns `bytes` (at least 1) of memory, aligned to a cache line, or null. The previous contents are lost.
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

// Divides one reservation into several arrays. A first pass with a null base measures the size, a second one returns
// pointers.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {}

  // Returns an array with as many elements as the product of `sizes`.
  template <typename T, typename... Sizes>
  T* Take(Sizes... sizes) {
    T* start = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    size_t bytes = sizeof(T);
    ((bytes = Times(bytes, sizes)), ...);
    used_ = Plus(used_, Plus(bytes, Scratch::kAlignment - 1) / Scratch::kAlignment * Scratch::kAlignment);
    return start;
  }

  // Returns the number of bytes taken so far.
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_SCRATCH_H_

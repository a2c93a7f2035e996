// Memory that a thread keeps between calls: it grows to the largest call and is never given back before the thread ends.

#ifndef SPARSIFINER_SCRATCH_H_
#define SPARSIFINER_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <new>

namespace sparsifiner {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { Free(); }

  // `bytes` of memory, aligned to a cache line; what it held before is lost.
  void* Reserve(size_t bytes) {
    if (bytes > size_) {
      Free();
      memory_ = ::operator new(bytes, std::align_val_t{kAlignment});
      size_ = bytes;
    }
    return memory_;
  }

  static constexpr size_t kAlignment = 64;

 private:
  void Free() {
    ::operator delete(memory_, std::align_val_t{kAlignment});
    memory_ = nullptr;
    size_ = 0;
  }

  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Deals one reservation out to several arrays: first pass with a null base to measure, second to hand out.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(size_t count) {
    T* start = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + Scratch::kAlignment - 1) / Scratch::kAlignment * Scratch::kAlignment;
    return start;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A thread's memory for work that it shares with others during a call, and for what it does alone.
inline Scratch& SharedScratch() {
  thread_local Scratch scratch;
  return scratch;
}
inline Scratch& OwnScratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace sparsifiner

#endif  // SPARSIFINER_SCRATCH_H_

// Resources of a kernel call: the caller's threads, and working memory that is kept for later calls.

#ifndef SPARSIFINER_CALL_H_
#define SPARSIFINER_CALL_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "scratch.h"
#include "sparsifiner.h"

namespace sparsifiner {

// Maximum number of pieces that a loop is split into. Enough pieces to balance cores of unequal speed, and few enough
// to make scheduling cheap. CallMemory tracks free pieces in the bits of a 64-bit integer.
constexpr size_t kPieces = 64;

// Memory of one call. It is not thread-local, because the first access to a thread-local variable allocates memory, and
// the C library aborts the process if that fails.
class CallMemory : public Allocated {
 public:
  Scratch& shared() { return shared_; }

  // Reserves the memory of one piece until Return; at most kPieces are reserved at a time. The lowest free one is
  // taken, so that a thread usually gets the memory that it has just returned and that is still in its cache.
  size_t Borrow() {
    uint64_t free = free_.load(std::memory_order_relaxed);
    while (!free_.compare_exchange_weak(free, free & (free - 1), std::memory_order_acquire)) {
    }
    return static_cast<size_t>(__builtin_ctzll(free));
  }
  Scratch& piece(size_t borrowed) { return pieces_[borrowed]; }
  void Return(size_t borrowed) { free_.fetch_or(uint64_t{1} << borrowed, std::memory_order_release); }

 private:
  Scratch shared_;
  Scratch pieces_[kPieces];
  std::atomic<uint64_t> free_{~uint64_t{0}};
};

// Memory of finished calls, kept for later ones while a holder exists. There is one CallMemory per concurrent call,
// each as large as the largest call needed.
class IdleMemory {
 public:
  static void Hold(int more) {
    if ((holds_ += more) > 0) return;
    for (auto& slot : slots_) delete slot.exchange(nullptr);
  }

  static CallMemory* Take() {
    for (auto& slot : slots_) {
      if (slot.load(std::memory_order_relaxed) == nullptr) continue;
      if (CallMemory* memory = slot.exchange(nullptr, std::memory_order_acquire)) return memory;
    }
    return new (std::nothrow) CallMemory;
  }

  static void Keep(CallMemory* memory) {
    for (auto& slot : slots_) {
      if (holds_.load(std::memory_order_relaxed) <= 0) break;
      CallMemory* none = nullptr;
      if (slot.compare_exchange_strong(none, memory, std::memory_order_release, std::memory_order_relaxed)) return;
    }
    delete memory;
  }

 private:
  static inline std::atomic<int> holds_{0};
  static inline std::atomic<CallMemory*> slots_[16] = {};
};

// Threads and memory of one call.
class Call {
 public:
  explicit Call(const sparsifiner_call& call) : call_(call), memory_(IdleMemory::Take()) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    if (failed_) {
      delete memory_;  // Release it: the process is short of memory.
    } else if (memory_ != nullptr) {
      IdleMemory::Keep(memory_);
    }
  }

  // Allocates the memory that all pieces share, at most once per call. take(&layout) runs twice: to measure and to
  // assign pointers. Returns false if memory runs out.
  template <class Take>
  bool Share(const Take& take) const {
    Layout measured(nullptr);
    take(&measured);
    void* memory = memory_ == nullptr ? nullptr : memory_->shared().Reserve(measured.used());
    failed_ = failed_ || memory == nullptr;
    if (failed_) return false;
    Layout layout(memory);
    take(&layout);
    return true;
  }

  // Runs fn(data, i, base) for i in [0, count), in any order and on any threads, and returns when all are done. `base`
  // points to `bytes` of memory, aligned to a cache line, for the exclusive use of fn until it returns; null for 0
  // bytes. Returns false if memory ran out, in which case fn did not run for every i.
  bool For(size_t count, size_t bytes, void (*fn)(void*, size_t, void*), void* data) const {
    if (count == 0) return true;
    failed_ = failed_ || memory_ == nullptr;
    if (failed_) return false;
    Loop loop{memory_, count, std::min(count, kPieces), bytes, fn, data, {false}, {0}};
    bool called = true;
    if (call_.parallel_for == nullptr) {
      for (size_t piece = 0; piece < loop.pieces; ++piece) RunPiece(&loop, piece);
    } else {
      called = call_.parallel_for(call_.threads, loop.pieces, RunPiece, &loop) != 0;
    }
    // Completed pieces are counted, because a runtime that runs out of memory may not report it.
    failed_ = !called || loop.failed || loop.done != loop.pieces;
    return !failed_;
  }

 private:
  struct Loop {
    CallMemory* memory;
    size_t count, pieces, bytes;
    void (*fn)(void*, size_t, void*);
    void* data;
    std::atomic<bool> failed;              // read for every i, so on another cache line than `done`
    alignas(64) std::atomic<size_t> done;  // completed pieces
  };

  // Runs an even share of the loop, in order, on one thread.
  static void RunPiece(void* data, size_t piece) noexcept {
    Loop& loop = *static_cast<Loop*>(data);
    if (loop.failed.load(std::memory_order_relaxed)) return;
    const size_t borrowed = loop.memory->Borrow();
    void* base = loop.bytes == 0 ? nullptr : loop.memory->piece(borrowed).Reserve(loop.bytes);
    if (loop.bytes != 0 && base == nullptr) {
      loop.failed = true;
    } else {
      const size_t each = loop.count / loop.pieces, more = loop.count % loop.pieces;
      const size_t begin = piece * each + std::min(piece, more), end = begin + each + (piece < more ? 1 : 0);
      for (size_t i = begin; i < end && !loop.failed.load(std::memory_order_relaxed); ++i) loop.fn(loop.data, i, base);
      ++loop.done;
    }
    loop.memory->Return(borrowed);
  }

  const sparsifiner_call& call_;
  CallMemory* memory_;
  mutable bool failed_ = false;
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_CALL_H_

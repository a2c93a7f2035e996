// What a call of a kernel runs on: the caller's threads, and memory that is kept for the next call.

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

// Pieces of a loop: enough for uneven cores, few enough to cost nothing, a bit each.
constexpr size_t kPieces = 64;

// Memory of one call. Not in thread-local variables: a thread's first touch of those allocates, and the C library ends
// the process where that fails.
class CallMemory : public Allocated {
 public:
  Scratch& shared() { return shared_; }

  // Memory for one piece, until it is returned; at most kPieces are borrowed at a time. The lowest first, so that a
  // thread mostly gets what it just returned.
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

// Memory of calls that are over, for the next: as much as the largest needed, as often as calls ran at a time, and only
// as long as a holder exists.
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

// One call's threads and memory.
class Call {
 public:
  explicit Call(const sparsifiner_call& call) : call_(call), memory_(IdleMemory::Take()) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    if (failed_) {
      delete memory_;  // Others need the memory that it holds.
    } else if (memory_ != nullptr) {
      IdleMemory::Keep(memory_);
    }
  }

  // Memory for the whole call, once per call: take(&layout) runs twice, to measure and to allocate. False: out of memory.
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

  // Runs fn(data, i, base) for i in [0, count), in any order and on any threads; returns when all are done. `base` are
  // `bytes` of memory, aligned to a cache line, that fn has to itself until it returns; null for 0 bytes. False: there
  // was not enough memory, and fn did not run for every i.
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
    // Pieces are counted, since a runtime that runs out of memory may fail to report it.
    failed_ = !called || loop.failed || loop.done != loop.pieces;
    return !failed_;
  }

 private:
  struct Loop {
    CallMemory* memory;
    size_t count, pieces, bytes;
    void (*fn)(void*, size_t, void*);
    void* data;
    std::atomic<bool> failed;              // read for every i: apart from what is written often
    alignas(64) std::atomic<size_t> done;  // pieces
  };

  // An even share of the loop, in order, on one of the threads.
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

// Thread pool of the library (sparsifiner.h), for callers without one of their own: OpenVINO's Python operators, C and
// C++.
//
// The calling thread takes part in each loop. After a loop, workers spin for a moment, because the next layer's loop
// usually follows soon. Then they sleep, because the caller's own threads may need the cores.

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "scratch.h"
#include "sparsifiner.h"

namespace {

using Run = void (*)(void* data, size_t i);

constexpr int kLooks = 2000;  // iterations of spinning before a worker sleeps: some tens of microseconds

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Loop shared by threads. A thread that enters late finds no items left.
struct Loop {
  Run run;
  void* data;
  size_t count;
  std::atomic<size_t> next{0};
};

class Lock {
 public:
  explicit Lock(pthread_mutex_t* mutex) : mutex_(mutex) { pthread_mutex_lock(mutex_); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  ~Lock() { pthread_mutex_unlock(mutex_); }

 private:
  pthread_mutex_t* mutex_;
};

}  // namespace

struct sparsifiner_pool : sparsifiner::Allocated {
  // Starts the workers. Returns false if memory runs out or a thread cannot be started.
  bool Start(size_t threads) {
    if (threads <= 1) return true;
    workers_ = static_cast<pthread_t*>(std::calloc(threads - 1, sizeof(pthread_t)));
    if (workers_ == nullptr) return false;
    for (; started_ + 1 < threads; ++started_) {
      if (pthread_create(&workers_[started_], nullptr, &sparsifiner_pool::Work, this) != 0) return false;
    }
    return true;
  }

  ~sparsifiner_pool() {
    {
      const Lock lock(&mutex_);
      ending_.store(true);
      pthread_cond_broadcast(&wake_);
    }
    for (size_t i = 0; i < started_; ++i) pthread_join(workers_[i], nullptr);
    std::free(workers_);
    pthread_cond_destroy(&wake_);
    pthread_mutex_destroy(&mutex_);
  }

  // Runs a loop, on the calling thread alone if the pool is in use.
  void For(size_t count, Run run, void* data) {
    bool idle = false;
    if (count < 2 || started_ == 0 || !taken_.compare_exchange_strong(idle, true)) {
      for (size_t i = 0; i < count; ++i) run(data, i);
      return;
    }
    Loop loop{run, data, count, {}};
    {
      const Lock lock(&mutex_);
      loop_ = &loop;
      numbered_.fetch_add(1);
      if (asleep_ != 0) pthread_cond_broadcast(&wake_);
    }
    RunItems(&loop);
    {
      const Lock lock(&mutex_);
      loop_ = nullptr;  // no more workers can enter it
    }
    while (inside_.load() != 0) Pause();  // wait for the items that workers have taken
    taken_.store(false);
  }

 private:
  static void RunItems(Loop* loop) {
    for (size_t i = loop->next.fetch_add(1); i < loop->count; i = loop->next.fetch_add(1)) loop->run(loop->data, i);
  }

  static void* Work(void* data) {
    auto* pool = static_cast<sparsifiner_pool*>(data);
    uint64_t last = 0;
    while (Loop* loop = pool->Next(&last)) {
      RunItems(loop);
      pool->inside_.fetch_sub(1);
    }
    return nullptr;
  }

  // Waits for the next loop and enters it. Returns null when the pool is destroyed.
  Loop* Next(uint64_t* last) {
    for (;;) {
      for (int look = 0; look < kLooks && numbered_.load() == *last && !ending_.load(); ++look) Pause();
      const Lock lock(&mutex_);
      while (numbered_.load() == *last && !ending_.load()) {
        ++asleep_;
        pthread_cond_wait(&wake_, &mutex_);
        --asleep_;
      }
      if (ending_.load()) return nullptr;
      *last = numbered_.load();
      if (loop_ == nullptr) continue;
      inside_.fetch_add(1);
      return loop_;
    }
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
  pthread_t* workers_ = nullptr;
  size_t started_ = 0;
  Loop* loop_ = nullptr;  // guarded by the mutex, like asleep_
  size_t asleep_ = 0;
  std::atomic<uint64_t> numbered_{0};  // number of loops so far
  std::atomic<size_t> inside_{0};      // number of workers in the loop
  std::atomic<bool> taken_{false}, ending_{false};
};

extern "C" {

sparsifiner_pool* sparsifiner_pool_create(size_t threads) {
  auto* pool = new (std::nothrow) sparsifiner_pool;
  if (pool == nullptr || pool->Start(threads)) return pool;
  delete pool;
  return nullptr;
}

void sparsifiner_pool_destroy(sparsifiner_pool* pool) { delete pool; }

int sparsifiner_pool_for(void* pool, size_t count, void (*run)(void* data, size_t i), void* data) {
  static_cast<sparsifiner_pool*>(pool)->For(count, run, data);
  return 1;
}

}  // extern "C"

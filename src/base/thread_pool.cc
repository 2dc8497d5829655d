#include "base/thread_pool.h"

#include <utility>

namespace sparkv {

void ThreadPool::Resize(int n_threads, Team team) {
  team_ = n_threads > 1 ? team : nullptr;
  n_team_ = n_threads;
  if (team_ != nullptr) n_threads = 1;  // of our own
  if (n_threads == int(workers_.size()) + 1) return;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
  for (int i = 1; i < n_threads; ++i) {
    try {
      workers_.emplace_back([this, i, seen = generation_] { Work(i, seen); });
    } catch (...) {
      return;
    }
  }
}

void ThreadPool::Run(int64_t n_tasks, Call call, void* context) {
  {
    std::lock_guard lock(mutex_);
    call_ = call;
    context_ = context;
    n_tasks_ = n_tasks;
    next_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    busy_ = int(workers_.size());
    ++generation_;
  }
  if (team_ != nullptr) {
    team_(
        [](void* self) {
          auto* pool = static_cast<ThreadPool*>(self);
          pool->Drain(pool->arrived_.fetch_add(1, std::memory_order_relaxed));
        },
        this, unsigned(n_team_), 0);
  } else {
    wake_.notify_all();
    Drain(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Nothing may be thrown through the frames of a host's runtime, or past a loop that others are in.
void ThreadPool::Drain(int thread) {
  try {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;)
      call_(context_, i, thread);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
    next_.store(n_tasks_, std::memory_order_relaxed);
  }
}

// `seen` is the generation when the worker was made: a thread that starts late still owes its part
// of the next loop.
void ThreadPool::Work(int thread, uint64_t seen) {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    lock.unlock();
    Drain(thread);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace sparkv

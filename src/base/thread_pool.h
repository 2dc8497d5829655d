// Threads that sleep until there is a loop to share. One loop at a time; the caller works too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace sparkv {

class ThreadPool {
 public:
  ~ThreadPool() { Resize(1); }

  // Threads in all, the caller included. Threads that cannot be started are left out.
  void Resize(int n_threads);
  int size() const { return int(workers_.size()) + 1; }

  // Calls body(task, thread) for task in [0, n_tasks); thread in [0, size()). Returns when all are
  // done.
  template <typename Body>
  void ParallelFor(int64_t n_tasks, Body&& body) {
    if (workers_.empty() || n_tasks <= 1) {
      for (int64_t i = 0; i < n_tasks; ++i) body(i, 0);
      return;
    }
    Run(
        n_tasks,
        [](void* context, int64_t task, int thread) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(task, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Call = void (*)(void* context, int64_t task, int thread);
  void Run(int64_t n_tasks, Call call, void* context);
  void Work(int thread, uint64_t seen);
  void Drain(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  uint64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t n_tasks_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace sparkv

// Threads for one loop at a time; the caller works too. They are the host's where it lends them:
// its threads are awake when a loop begins, and threads of our own would compete with them while
// they wait for their next one. Else threads of our own, which sleep between loops.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace sparkv {

class ThreadPool {
 public:
  ~ThreadPool() { Resize(1); }

  // Calls body(data) on at most n_threads threads at once, the caller among them; flags is 0. So
  // does GOMP_parallel of an OpenMP runtime, whose team is made anew when its size changes and so
  // wants the host's size.
  using Team = void (*)(void (*body)(void*), void* data, unsigned n_threads, unsigned flags);

  // Threads in all, the caller included: of `team`, NULL: our own. Threads that cannot be started
  // are left out.
  void Resize(int n_threads, Team team = nullptr);
  int size() const { return team_ != nullptr ? n_team_ : int(workers_.size()) + 1; }
  bool own() const { return team_ == nullptr; }

  // Calls body(task, thread) for task in [0, n_tasks); thread in [0, size()). Returns when all are
  // done. What a body throws is thrown again here, and some tasks may not have run.
  template <typename Body>
  void ParallelFor(int64_t n_tasks, Body&& body) {
    if (size() == 1 || n_tasks <= 1) {
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

  Team team_ = nullptr;
  int n_team_ = 1;
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
  std::atomic<int> arrived_{0};  // threads of the team
  std::exception_ptr failure_;   // the first of a loop
};

}  // namespace sparkv

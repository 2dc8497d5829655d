#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <new>
#include <set>

#include "base/half.h"
#include "base/reserve.h"
#include "base/thread_pool.h"

namespace sparkv {
namespace {

TEST(Half, EveryPatternSurvivesTheRoundTrip) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = HalfToFloat(uint16_t(h));
    if (std::isnan(f)) {
      EXPECT_EQ(FloatToHalf(f), (h & 0x8000u) | 0x7e00u);
    } else {
      ASSERT_EQ(FloatToHalf(f), h);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (uint32_t h = 0; h < 0x7bffu; ++h) {
    const double a = HalfToFloat(uint16_t(h)), b = HalfToFloat(uint16_t(h + 1));
    const float middle = float((a + b) / 2);
    ASSERT_EQ(FloatToHalf(middle), h % 2 == 0 ? h : h + 1);
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 0.0f)), h);
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 1e6f)), h + 1);
  }
  EXPECT_EQ(FloatToHalf(65519.0f), 0x7bffu);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00u);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfc00u);
}

// Pages of the region that the kernel holds.
size_t ResidentPages(const Reserve& region) {
  std::vector<unsigned char> in_core(region.size() / 4096);
  EXPECT_EQ(mincore(region.data(), region.size(), in_core.data()), 0);
  size_t n = 0;
  for (const unsigned char page : in_core) n += page & 1;
  return n;
}

TEST(Reserve, CommitsWhatIsTouchedAndGivesItBack) {
  Reserve region;
  ASSERT_TRUE(region.Map(size_t{64} << 20, "test").ok());
  EXPECT_EQ(region.committed(), 0u);
  EXPECT_EQ(ResidentPages(region), 0u);
  const auto fill = [&](size_t offset, size_t bytes) {
    region.Touch(offset, bytes);
    for (size_t i = 0; i < bytes; ++i) region.data()[offset + i] = 1;
  };
  fill(4096 * 10 + 5, 4096 * 3);
  EXPECT_EQ(region.committed(), 4u * 4096);
  EXPECT_EQ(ResidentPages(region) * 4096, region.committed());
  fill(4096 * 10, 100);
  EXPECT_EQ(region.committed(), 4u * 4096);
  region.Release(4096 * 10 + 1, 4096 * 3);  // only two pages lie wholly inside
  EXPECT_EQ(region.committed(), 2u * 4096);
  EXPECT_EQ(ResidentPages(region) * 4096, region.committed());
  EXPECT_EQ(region.data()[4096 * 12], 0);
}

TEST(Reserve, SaysWhatCouldNotBeHad) {
  Reserve region;
  const Status status = region.Map(size_t{1} << 62, "packed rows");
  EXPECT_EQ(status.code, SPARKV_NO_MEMORY);
  EXPECT_NE(status.text.find("packed rows"), std::string::npos);
}

void EveryTaskRunsOnce(ThreadPool& pool, int threads, int64_t n) {
  std::vector<std::atomic<int>> count(static_cast<size_t>(n));
  std::atomic<bool> thread_in_range{true};
  pool.ParallelFor(n, [&](int64_t task, int thread) {
    ++count[size_t(task)];
    if (thread < 0 || thread >= threads) thread_in_range = false;
  });
  for (const auto& c : count) ASSERT_EQ(c.load(), 1);
  EXPECT_TRUE(thread_in_range);
}

TEST(ThreadPool, RunsEveryTaskOnceWhateverItsSize) {
  ThreadPool pool;
  for (const int threads : {1, 2, 5, 3, 1, 4}) {
    pool.Resize(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const int64_t n : {0, 1, 2, 7, 1000}) EveryTaskRunsOnce(pool, threads, n);
  }
}

// A host that lends its threads: one call more than it was asked for would be a bug.
int calls_of_team = 0;
void TwoInTurn(void (*body)(void*), void* data, unsigned n_threads, unsigned) {
  ++calls_of_team;
  for (unsigned i = 0; i < std::min(n_threads, 2u); ++i) body(data);
}

void RunOnTeam(ThreadPool::Team team) {
  ThreadPool pool;
  for (const int threads : {2, 4, 1, 3}) {
    pool.Resize(threads, team);
    EXPECT_EQ(pool.size(), threads);
    EXPECT_EQ(pool.own(), threads == 1);
    for (const int64_t n : {0, 1, 2, 1000}) EveryTaskRunsOnce(pool, threads, n);
  }
  pool.Resize(3);
  EXPECT_TRUE(pool.own());
}

TEST(ThreadPool, RunsOnTheThreadsOfAHost) {
  calls_of_team = 0;
  RunOnTeam(TwoInTurn);
  EXPECT_EQ(calls_of_team, 3 * 2);  // not for one thread, nor for one task
}

#if defined(__linux__) && !defined(__SANITIZE_THREAD__)  // which knows nothing of its barriers
TEST(ThreadPool, RunsOnTheTeamOfAnOpenMpRuntime) {
  void* runtime = dlopen("libgomp.so.1", RTLD_LAZY);
  if (runtime == nullptr) GTEST_SKIP() << "no libgomp.so.1";
  RunOnTeam(reinterpret_cast<ThreadPool::Team>(dlsym(runtime, "GOMP_parallel")));
}
#endif

TEST(ThreadPool, WhatABodyThrowsComesOutOfTheLoopAndTheNextOneRuns) {
  for (const ThreadPool::Team team : {ThreadPool::Team{nullptr}, ThreadPool::Team{TwoInTurn}}) {
    ThreadPool pool;
    pool.Resize(3, team);
    for (int round = 0; round < 20; ++round) {
      EXPECT_THROW(pool.ParallelFor(50,
                                    [](int64_t task, int) {
                                      if (task % 20 == 7) throw std::bad_alloc();
                                    }),
                   std::bad_alloc);
      std::atomic<int> sum{0};
      pool.ParallelFor(8, [&](int64_t task, int) { sum += int(task); });
      ASSERT_EQ(sum.load(), 28);
    }
  }
}

TEST(ThreadPool, LoopsDirectlyAfterResizeDoNotHang) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool;
    pool.Resize(3);
    std::atomic<int> sum{0};
    pool.ParallelFor(8, [&](int64_t task, int) { sum += int(task); });
    ASSERT_EQ(sum.load(), 28);
  }
}

}  // namespace
}  // namespace sparkv

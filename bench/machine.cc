#include "machine.h"

#include <benchmark/benchmark.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

namespace sparkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Reads memory front to back. The wider the loads, the more lines are under way at a time: on one
// machine 6 GB/s by words, 11 by 64 bytes.
template <typename Vector>
[[gnu::always_inline]] inline void Read(const uint8_t* memory, size_t n) {
  Vector sum[4] = {};
  for (size_t at = 0; at + sizeof(sum) <= n; at += sizeof(sum)) {
    for (size_t k = 0; k < 4; ++k) {
      Vector x;
      std::memcpy(&x, memory + at + k * sizeof(Vector), sizeof(Vector));
      sum[k] ^= x;
    }
  }
  for (Vector& s : sum) benchmark::DoNotOptimize(s);
}

// Twelve independent sums in registers hide the latency of a multiply-add on every core of today.
template <typename Vector>
[[gnu::always_inline]] inline double MultiplyAdds() {
  constexpr int kRounds = 1 << 20, kSums = 12, kLanes = int(sizeof(Vector) / sizeof(float));
  Vector sum[kSums], factor, step;
  for (int j = 0; j < kLanes; ++j) factor[j] = 0.5f, step[j] = 0.25f;
  benchmark::DoNotOptimize(factor);
  for (Vector& s : sum) s = step;
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) sum[k] = sum[k] * factor + step;
  }
  for (Vector& s : sum) benchmark::DoNotOptimize(s);
  return double(kRounds) * kSums * kLanes;
}

using Floats4 = float __attribute__((vector_size(16)));
using Words2 = uint64_t __attribute__((vector_size(16)));
#if defined(__x86_64__)
using Floats8 = float __attribute__((vector_size(32)));
using Floats16 = float __attribute__((vector_size(64)));
using Words4 = uint64_t __attribute__((vector_size(32)));
using Words8 = uint64_t __attribute__((vector_size(64)));
[[gnu::target("avx512f")]] double MultiplyAdds512() { return MultiplyAdds<Floats16>(); }
[[gnu::target("avx2,fma")]] double MultiplyAdds256() { return MultiplyAdds<Floats8>(); }
[[gnu::target("avx512f")]] void Read512(const uint8_t* m, size_t n) { Read<Words8>(m, n); }
[[gnu::target("avx2")]] void Read256(const uint8_t* m, size_t n) { Read<Words4>(m, n); }
#endif
double MultiplyAdds128() { return MultiplyAdds<Floats4>(); }
void Read128(const uint8_t* m, size_t n) { Read<Words2>(m, n); }

void ReadByThisCpu(const uint8_t* memory, size_t n) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Read512(memory, n);
  if (__builtin_cpu_supports("avx2")) return Read256(memory, n);
#endif
  Read128(memory, n);
}

// In f32; products of bytes (AVX-512) may come below this bound.
double MultiplyAddsOfThisCpu() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return MultiplyAdds512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MultiplyAdds256();
#endif
  return MultiplyAdds128();
}

// Best of some rounds in which all threads do `work` at once; it returns how much it did.
template <typename Work>
double Best(int threads, const Work& work) {
  double best = 0.0;
  for (int round = 0; round < 5; ++round) {
    std::vector<double> done(static_cast<size_t>(threads));
    const auto start = Clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { done[size_t(t)] = work(t); });
    done[0] = work(0);
    for (std::thread& other : others) other.join();
    const double time = SecondsSince(start);
    double sum = 0.0;
    for (const double x : done) sum += x;
    best = std::max(best, sum / time);
  }
  return best;
}

}  // namespace

Limits MeasureLimits(int threads) {
  // More than most caches hold; each thread reads its own part.
  const std::vector<uint8_t> memory(size_t{512} << 20, 1);
  const size_t part = memory.size() / size_t(threads);
  Limits limits;
  limits.bytes_per_second = Best(threads, [&](int thread) {
    ReadByThisCpu(memory.data() + part * size_t(thread), part);
    return double(part);
  });
  limits.multiply_adds_per_second = Best(threads, [](int) { return MultiplyAddsOfThisCpu(); });
  return limits;
}

std::string CpuName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(": ") + 2);
  }
  return "unknown CPU";
}

double Load() {
  double load = 0.0;
  return getloadavg(&load, 1) == 1 ? load : -1.0;
}

}  // namespace sparkv::bench

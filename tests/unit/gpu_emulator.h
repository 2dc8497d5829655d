// GPU kernels on a CPU: the threads of one block as fibers that take turns where they meet, so that
// the very source of a kernel is tested on machines without a GPU. Slow, and one block at a time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "base/half.h"
#include "base/status.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace sparkv::gpu {
using std::max;
using std::min;

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline thread_local uint4* block_memory = nullptr;  // as extern __shared__

class Block {
 public:
  // Runs body once per thread of every block.
  static void Launch(dim3 grid, unsigned n_threads, size_t shared_bytes,
                     const std::function<void()>& body) {
    std::vector<uint4> memory(shared_bytes / sizeof(uint4) + 1);
    block_memory = memory.data();
    gridDim = grid;
    blockDim = {n_threads, 1, 1};
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          Block(n_threads, body).Run();
        }
      }
    }
  }

  // Gives every lane of the warp what all have put in.
  static const uint64_t* Exchange(const uint64_t (&mine)[4]) {
    Block& block = *current_;
    Warp& warp = block.warps_[block.thread_ / 32];
    const unsigned lane = block.thread_ % 32,
                   n = std::min(32u, block.n_threads_ - block.thread_ / 32 * 32);
    auto& buffer = warp.buffer[block.parity_[block.thread_]++ % 2];
    std::copy(mine, mine + 4, buffer + 4 * lane);
    block.Meet(&warp.met, n);
    return buffer;
  }
  static void MeetAll() { current_->Meet(&current_->met_, current_->n_threads_); }

 private:
  struct Meeting {
    unsigned arrived = 0, generation = 0;
  };
  struct Warp {
    Meeting met;
    uint64_t buffer[2][4 * 32];
  };

  Block(unsigned n_threads, const std::function<void()>& body)
      : n_threads_(n_threads), body_(body), warps_((n_threads + 31) / 32), parity_(n_threads) {}

  void Run() {
    constexpr size_t kStack = 256 << 10;
    std::vector<std::unique_ptr<char[]>> stacks;
    fibers_.resize(n_threads_);
    done_.assign(n_threads_, false);
    current_ = this;
    for (unsigned i = 0; i < n_threads_; ++i) {
      stacks.emplace_back(new char[kStack]);
      MakeFiber(&fibers_[i], stacks[i].get(), kStack);
    }
    for (unsigned left = n_threads_; left > 0;) {
      for (unsigned i = 0; i < n_threads_; ++i) {
        if (done_[i]) continue;
        thread_ = i;
        threadIdx = {i, 0, 0};
        swapcontext(&scheduler_, &fibers_[i]);
        left -= done_[i];
      }
    }
  }
  void MakeFiber(ucontext_t* fiber, char* stack, size_t size) {
    getcontext(fiber);
    fiber->uc_stack.ss_sp = stack;
    fiber->uc_stack.ss_size = size;
    fiber->uc_link = &scheduler_;
    makecontext(fiber, &Block::Enter, 0);
  }
  static void Enter() {
    current_->body_();
    current_->done_[current_->thread_] = true;
  }
  void Meet(Meeting* meeting, unsigned n) {
    const unsigned generation = meeting->generation;
    if (++meeting->arrived == n) {
      meeting->arrived = 0;
      ++meeting->generation;
      return;
    }
    const unsigned me = thread_;
    while (meeting->generation == generation) swapcontext(&fibers_[me], &scheduler_);
  }

  unsigned n_threads_, thread_ = 0;
  const std::function<void()>& body_;
  std::vector<Warp> warps_;
  std::vector<unsigned> parity_;
  std::vector<ucontext_t> fibers_;
  std::vector<bool> done_;
  ucontext_t scheduler_;
  Meeting met_;
  static inline thread_local Block* current_ = nullptr;
};

inline void __syncthreads() { Block::MeetAll(); }
inline void __syncwarp() { Block::Exchange({0, 0, 0, 0}); }
inline float __shfl_sync(unsigned, float x, int from) {
  const uint64_t* all = Block::Exchange({std::bit_cast<uint32_t>(x), 0, 0, 0});
  return std::bit_cast<float>(uint32_t(all[4 * from]));
}
inline float __shfl_xor_sync(unsigned mask, float x, int apart) {
  return __shfl_sync(mask, x, int(threadIdx.x) % 32 ^ apart);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
  const uint64_t* all = Block::Exchange({yes, 0, 0, 0});
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= unsigned(all[4 * i]) << i;
  return lanes;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int by) {
  return uint32_t((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}
inline int __float2int_rn(float x) { return int(std::lrint(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline void CopyAsync(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void EndCopyGroup() {}
template <int kLeft>
void AwaitCopies() {}

inline float LowOf(uint32_t pair) { return HalfToFloat(uint16_t(pair)); }
inline float HighOf(uint32_t pair) { return HalfToFloat(uint16_t(pair >> 16)); }
inline uint32_t PairOf(float low, float high) {
  return FloatToHalf(low) | uint32_t(FloatToHalf(high)) << 16;
}
// In double the product is exact and the sum nearly; rounding it to f32 first, to odd, keeps it so.
inline float RoundToOdd(double x) {
  float f = float(x);
  if (double(f) == x || !std::isfinite(f)) return f;
  if (std::abs(double(f)) > std::abs(x)) f = std::nextafter(f, 0.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1);
}
inline uint32_t PairFma(uint32_t a, uint32_t b, uint32_t c) {
  return PairOf(RoundToOdd(double(LowOf(a)) * LowOf(b) + LowOf(c)),
                RoundToOdd(double(HighOf(a)) * HighOf(b) + HighOf(c)));
}
inline uint32_t PairAdd(uint32_t a, uint32_t b) { return PairFma(a, 0x3c003c00u, b); }

inline uint32_t PairAbs(uint32_t a) { return a & 0x7fff7fffu; }
template <uint32_t kMask, uint32_t kBase>
uint32_t Pick(uint32_t bits) {
  return (bits & kMask) | kBase;
}
inline float Exp2(float x) { return std::exp2(x); }

inline void MultiplyAdd(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint64_t* all = Block::Exchange(
      {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b[0] | uint64_t(b[1]) << 32, 0});
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const auto half = [](uint32_t pair, int i) { return i % 2 == 0 ? LowOf(pair) : HighOf(pair); };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    double sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;  // the lane of four that holds k
      const uint64_t left = all[4 * (4 * g + from) + k / 8];
      const uint64_t right = all[4 * (4 * column + from) + 2];
      sum += double(half(uint32_t(i / 2 == 0 ? left : left >> 32), k)) *
             half(uint32_t(k / 8 == 0 ? right : right >> 32), k);
    }
    acc[i] = float(sum);
  }
}

inline void MultiplyAdd(int (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint64_t* all = Block::Exchange(
      {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b[0] | uint64_t(b[1]) << 32, 0});
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int from = k % 16 / 4;  // the lane of four that holds k
      const uint64_t left = all[4 * (4 * g + from) + k / 16] >> (32 * (i / 2));
      const uint64_t right = all[4 * (4 * column + from) + 2] >> (32 * (k / 16));
      acc[i] += int8_t(left >> (8 * (k % 4))) * int8_t(right >> (8 * (k % 4)));
    }
  }
}
inline uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i) & 15;
    const auto byte = uint8_t(bytes >> (8 * (selector & 7)));
    picked |= uint32_t(selector < 8 ? byte : byte >> 7 ? 0xff : 0) << (8 * i);
  }
  return picked;
}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }

// What step-inl.h starts kernels with.
template <typename Kernel, typename... Args>
Status Launch(Kernel* kernel, dim3 grid, int n_threads, size_t shared_bytes, void*,
              const Args&... args) {
  Block::Launch(grid, unsigned(n_threads), shared_bytes, [&] { kernel(args...); });
  return Status::Ok();
}

}  // namespace sparkv::gpu

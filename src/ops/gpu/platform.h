// What kernels need of a GPU beyond the names that CUDA gives it. For other compilers the emulator
// of the tests (tests/unit/gpu_emulator.h) brings all of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "base/status.h"

namespace sparkv::gpu {

extern __shared__ uint4 block_memory[];  // as much as the launch asks for

// 16-byte copies to shared memory that go on behind the thread's back; a group is what was begun
// since the last one.
__device__ inline void CopyAsync(void* shared, const void* global) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ inline void EndCopyGroup() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// acc[16][8] += a[16][16] b[16][8], f16 in f32. Lane 4 g + t holds of a the pairs (g, 2t), (g + 8,
// 2t), (g, 2t + 8), (g + 8, 2t + 8), of b (2t, g), (2t + 8, g), of acc (g, 2t), (g + 8, 2t).
__device__ inline void MultiplyAdd(float (&acc)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same in whole numbers: acc[16][8] += a[16][32] b[32][8], signed bytes. Of a a lane holds (g,
// 4t .. 4t + 3), (g + 8, likewise), (g, 4t + 16 ..), (g + 8, likewise), of b (4t .., g), (4t + 16
// .., g).
__device__ inline void MultiplyAdd(int (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Pairs of f16 in a word.
__device__ inline uint32_t PairAdd(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ inline uint32_t PairFma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
__device__ inline uint32_t PairAbs(uint32_t a) {  // free: instructions that read it take it along
  uint32_t abs;
  asm("abs.f16x2 %0, %1;" : "=r"(abs) : "r"(a));
  return abs;
}
__device__ inline uint32_t PairOf(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline float LowOf(uint32_t pair) {
  return __half2float(__ushort_as_half(pair & 0xffff));
}
__device__ inline float HighOf(uint32_t pair) { return __half2float(__ushort_as_half(pair >> 16)); }

// (bits & kMask) | kBase in one instruction, which nvcc does not find by itself.
template <uint32_t kMask, uint32_t kBase>
__device__ inline uint32_t Pick(uint32_t bits) {
  uint32_t picked;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(picked) : "r"(bits), "n"(kMask), "n"(kBase));
  return picked;
}

// Byte i: of low and high the one that nibble i of the selectors names; from 8 on its highest bit
// eight times.
__device__ inline uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selectors));
  return picked;
}

__device__ inline float Exp2(float x) {  // 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline Status StatusOf(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Unsupported(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Args>
Status Launch(void (*kernel)(Parameters...), dim3 grid, int n_threads, size_t shared_bytes,
              void* stream, const Args&... args) {
  if (shared_bytes > 48 << 10) {  // more must be asked for
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here, not by the next launch
      return StatusOf(error, "shared memory");
    }
  }
  kernel<<<grid, n_threads, shared_bytes, cudaStream_t(stream)>>>(args...);
  return StatusOf(cudaGetLastError(), "launch");
}

}  // namespace sparkv::gpu

#endif

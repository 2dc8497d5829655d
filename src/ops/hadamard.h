// Orthonormal Walsh-Hadamard rotation of blocks; its own inverse. The order of additions is fixed,
// so every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

namespace sparkv {

using SixteenFloats [[gnu::vector_size(64)]] = float;

// Sums and differences of numbers kHalf apart, of sixteen: a - b is a + -b, to the bit.
template <int kHalf, int... kLane>
[[gnu::always_inline]] static inline void SumsAndDifferences(SixteenFloats* x,
                                                             std::integer_sequence<int, kLane...>) {
  const SixteenFloats sign = {((kLane & kHalf) == 0 ? 1.0f : -1.0f)...};
  *x = __builtin_shufflevector(*x, *x, (kLane ^ kHalf)...) + *x * sign;
}

// x: [n], n a multiple of `block`, block a power of two.
static inline void Rotate(float* x, int n, int block) {
  int half = 1;
  if (block >= 16) {
    for (int i = 0; i < n; i += 16) {
      constexpr auto kLanes = std::make_integer_sequence<int, 16>();
      SixteenFloats v;
      std::memcpy(&v, x + i, sizeof(v));
      SumsAndDifferences<1>(&v, kLanes);
      SumsAndDifferences<2>(&v, kLanes);
      SumsAndDifferences<4>(&v, kLanes);
      SumsAndDifferences<8>(&v, kLanes);
      std::memcpy(x + i, &v, sizeof(v));
    }
    half = 16;
  }
  for (; half < block; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      float* __restrict a = x + i;
      float* __restrict b = x + i + half;
      for (int j = 0; j < half; ++j) {
        const float s = a[j] + b[j], d = a[j] - b[j];
        a[j] = s;
        b[j] = d;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(float(block));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace sparkv

// Orthonormal Walsh-Hadamard rotation of blocks; its own inverse. The order of additions is fixed,
// so every instruction set gives the same bits.
#pragma once

#include <cmath>

namespace sparkv {

// x: [n], n a multiple of `block`, block a power of two.
static inline void Rotate(float* x, int n, int block) {
  for (int half = 1; half < block; half *= 2) {
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

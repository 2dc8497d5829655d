// What stands for a pruned channel (docs/method.md, S5 and S6).
#pragma once

#include <cstdint>

#include "sparkv/sparkv.h"

namespace sparkv {

// A channel is dead when its weight is at most this share of the largest one, or not finite: it is
// restored as 0.
inline constexpr double kDeadWeight = 1e-12;

// a[j], [head_dim]: restored magnitude of channel j per unit of the token's scalar: 1/sqrt(u[j])
// (zero, mean) or 1/u[j] (paper); 0 for dead channels; 1 for all without weights.
void RestoreTable(const float* u, int head_dim, sparkv_recover how, double* a);

// out = k where mask is not 0, elsewhere sign(k[j]) * c * a[j] with sign(0) = -1, or 0 for
// SPARKV_RECOVER_ZERO.
//   mean:  c = sqrt(mean of s[j] over s[j] < th), th the smallest kept contribution, all channels
//   if none is kept paper: c = mean of u[j] * |k[j]| over the pruned channels that are not dead
// NaN and infinity stay in the token that holds them.
void RecoverKey(const float* k, const float* u, const uint8_t* mask, int head_dim,
                sparkv_recover how, float* out);

}  // namespace sparkv

// Channel weights from the queries of the observation window (docs/method.md, S2).
#pragma once

#include <cstddef>

#include "sparkv/sparkv.h"

namespace sparkv {

// What one query position adds to u^2: the square of the group's mean (signed) or the group's mean
// square (energy). q: `group` query heads, head_stride floats apart, [head_dim] each; energy:
// [head_dim], overwritten.
void QueryEnergy(const float* q, size_t head_stride, int group, int head_dim, sparkv_group how,
                 float* energy);

// u[j] = sqrt(sum over positions of QueryEnergy). q: [group][n_queries][head_dim]; u: [head_dim]
void ChannelWeight(const float* q, int group, int n_queries, int head_dim, sparkv_group how,
                   float* u);

// Channels of one pair that RoPE turns take the mean of their energies. n_rot: channels rotated,
// the first ones; neox: pairs (j, j + n_rot / 2), else (2j, 2j + 1). Ours: over a short text the
// slow pairs hardly turn, so one of the two looks unused until it is not. energy: [head_dim]; an
// n_rot that fits no head changes nothing.
void ShareInPairs(float* energy, int head_dim, int n_rot, bool neox);

}  // namespace sparkv

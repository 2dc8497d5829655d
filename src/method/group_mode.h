// SparK-g: a token keeps about the channels that cover 99 % of its contribution, in five sizes
// (docs/method.md, section 5).
#pragma once

#include <cstdint>

#include "sparkv/sparkv.h"

namespace sparkv {

inline constexpr double kGroupCoverage = 0.99;
inline constexpr double kGroupBorder[4] = {0.2, 0.4, 0.6,
                                           0.8};  // group = borders below the covering count
inline constexpr double kGroupKept[5] = {0.1, 0.3, 0.5, 0.7,
                                         0.9};  // share of channels that a group keeps

// Returns the group 0..4 of one token and its mask; channels are always ranked by k^2 * u. mask:
// [head_dim]
int SelectGroup(const float* k, const float* u, int head_dim, uint8_t* mask);

}  // namespace sparkv

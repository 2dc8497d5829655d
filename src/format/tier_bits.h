// How a head shares the bits of a key among the tiers of its channels (docs/method.md, section 13).
// Part of the format: must never change.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparkv {

inline constexpr int kTiers = 4;

// The lowest bits of the f16 weights of a head say, in those of every channel, which tier it is in;
// above that, in the weights of channels 5 t .. 5 t + 4, how far the energy of weighted keys falls
// from tier t to the next one, a bit in each, in steps of 3/4 dB.
inline constexpr int kTierMarks = 7;  // the bits of a weight that are no part of its number
inline constexpr int kFallBits = 5;
inline constexpr int kMostFall = (1 << kFallBits) - 1;
inline constexpr double kFallSteps = 4.0 / 3.0;  // per dB

static constexpr int TierOf(uint16_t weight) { return weight & 3; }
static constexpr int TierFall(const uint16_t* weights, int tier) {
  int fall = 0;
  for (int b = 0; b < kFallBits; ++b) fall |= (weights[kFallBits * tier + b] >> 2 & 1) << b;
  return fall;
}
// All of them, as one number.
static constexpr uint32_t TierFalls(const uint16_t* weights) {
  uint32_t falls = 0;
  for (int t = 0; t < kTiers - 1; ++t) falls |= uint32_t(TierFall(weights, t)) << (kFallBits * t);
  return falls;
}
static inline void SetTierFall(int tier, int fall, uint16_t* weights) {
  for (int b = 0; b < kFallBits; ++b) {
    uint16_t& weight = weights[kFallBits * tier + b];
    weight = uint16_t((weight & ~4) | (fall >> b & 1) << 2);
  }
}

// Gives `sum` bits away one by one, each to the tier where it takes most error away; the earlier
// one where equal. Kernels read more than five bits in the first tier only.
static constexpr void ShareBits(const int (&fall)[kTiers - 1], int sum, int (&bits)[kTiers]) {
  // The n-th bit of a number takes 10^(kWorth / 1000) of its tier's energy away: what the trellis
  // reaches, 4.85, 10.4, 15.9, 21.4, 26.9, 32.5 and 38.0 dB with 1 to 7 bits. Hundredths of dB.
  constexpr int kWorth[] = {-172, -627, -1184, -1734, -2284, -2830, -3394};
  constexpr int kMost[kTiers] = {7, 5, 5, 5};
  int energy[kTiers] = {};
  for (int t = 1; t < kTiers; ++t) energy[t] = energy[t - 1] - 75 * fall[t - 1];
  std::fill(bits, bits + kTiers, 0);
  for (; sum > 0; --sum) {
    int best = -1;
    for (int t = 0; t < kTiers; ++t) {
      if (bits[t] == kMost[t]) continue;
      if (best < 0 || energy[t] + kWorth[bits[t]] > energy[best] + kWorth[bits[best]]) best = t;
    }
    ++bits[best];
  }
}

}  // namespace sparkv

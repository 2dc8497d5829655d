// Logarithmic grids for scales: value(e) = 2^((e - 1) / steps - bias), e >= 1; e = 0 is zero.
// A scale on a grid survives unpacking, rounding to f16 and packing again, which a scale stored as
// f16 does not: this is what makes packing idempotent. Everything here is exact table look-up and
// comparison, so bytes do not depend on libm. Inlined everywhere for the reason that base/half.h
// gives.
#pragma once

#include <bit>
#include <cstdint>

namespace sparkv {

// 2^(i / 64) as f32, i = 0..63. Part of the format: must never change.
inline constexpr float kPow2Table[64] = {
    0x1.000000p+0f, 0x1.02c9a4p+0f, 0x1.059b0ep+0f, 0x1.087452p+0f, 0x1.0b5586p+0f, 0x1.0e3ec4p+0f,
    0x1.11301ep+0f, 0x1.1429aap+0f, 0x1.172b84p+0f, 0x1.1a35bep+0f, 0x1.1d4874p+0f, 0x1.2063b8p+0f,
    0x1.2387a6p+0f, 0x1.26b456p+0f, 0x1.29e9e0p+0f, 0x1.2d285ap+0f, 0x1.306fe0p+0f, 0x1.33c08cp+0f,
    0x1.371a74p+0f, 0x1.3a7db4p+0f, 0x1.3dea64p+0f, 0x1.4160a2p+0f, 0x1.44e086p+0f, 0x1.486a2cp+0f,
    0x1.4bfdaep+0f, 0x1.4f9b28p+0f, 0x1.5342b6p+0f, 0x1.56f474p+0f, 0x1.5ab07ep+0f, 0x1.5e76f2p+0f,
    0x1.6247ecp+0f, 0x1.662388p+0f, 0x1.6a09e6p+0f, 0x1.6dfb24p+0f, 0x1.71f75ep+0f, 0x1.75feb6p+0f,
    0x1.7a1148p+0f, 0x1.7e2f34p+0f, 0x1.82589ap+0f, 0x1.868d9ap+0f, 0x1.8ace54p+0f, 0x1.8f1aeap+0f,
    0x1.93737cp+0f, 0x1.97d82ap+0f, 0x1.9c4918p+0f, 0x1.a0c668p+0f, 0x1.a5503cp+0f, 0x1.a9e6b6p+0f,
    0x1.ae89fap+0f, 0x1.b33a2cp+0f, 0x1.b7f770p+0f, 0x1.bcc1eap+0f, 0x1.c199bep+0f, 0x1.c67f12p+0f,
    0x1.cb720ep+0f, 0x1.d072d4p+0f, 0x1.d5818ep+0f, 0x1.da9e60p+0f, 0x1.dfc974p+0f, 0x1.e502eep+0f,
    0x1.ea4afap+0f, 0x1.efa1bep+0f, 0x1.f50766p+0f, 0x1.fa7c18p+0f,
};

// Steps per octave divide 64. kMax is the largest exponent code; the code above it may mean "not
// finite".
template <int kSteps, int kBias, int kMax>
struct LogGrid {
  static constexpr int kStride = 64 / kSteps;
  static constexpr int kMost = kMax;

  [[gnu::always_inline]] static constexpr float Value(int e) {
    if (e == 0) return 0.0f;
    const int octave = (e - 1) / kSteps - kBias;
    return kPow2Table[(e - 1) % kSteps * kStride] *
           std::bit_cast<float>(uint32_t(octave + 127) << 23);
  }

  // Smallest e with Value(e) * (1 + tolerance) >= x; x is finite and not negative. Values below the
  // grid give 0.
  [[gnu::always_inline]] static int Ceil(float x, float tolerance) {
    const float wanted = x / (1.0f + tolerance);
    if (!(wanted > Value(1) * 0.5f)) return 0;
    int e = Below(wanted);
    if (e < 1) e = 1;
    while (e < kMax && Value(e) < wanted) ++e;
    return e;
  }

  // e with Value(e) nearest to x by ratio; below half of the grid's first value: 0.
  [[gnu::always_inline]] static int Nearest(float x) {
    if (!(x > Value(1) * 0.5f)) return 0;
    int e = Below(x);
    if (e < 1) return 1;
    // The border between two neighbours is their geometric mean: compare x / low with high / x.
    while (e < kMax && x * x > Value(e) * Value(e + 1)) ++e;
    return e;
  }

 private:
  // A code at or below x and close to it (may be < 1): log2(1 + m) >= m for m in [0, 1).
  [[gnu::always_inline]] static int Below(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const int octave = int(bits >> 23) - 127;
    const int step = int((uint64_t(bits & 0x7fffffu) * kSteps) >> 23);
    const int e = (octave + kBias) * kSteps + 1 + step;
    return e < kMax ? e : kMax;
  }
};

using KeyScaleGrid = LogGrid<32, 16, 1022>;  // largest kept |k| of a key row; 10 bits
using MeanGrid = LogGrid<8, 20, 255>;  // magnitude of pruned channels beside f16 kept ones; 8 bits
using ValueScaleGrid = LogGrid<64, 32, 4094>;  // largest |x| of a rotated value row; 12 bits
using TierGainGrid = LogGrid<4, 8, 62>;        // outermost level of a tier; 6 bits
using ValueGainGrid = LogGrid<4, 40, 254>;  // outermost level of a trellis-coded value row; 8 bits
inline constexpr int kTierGainNotFinite = 63;
inline constexpr int kValueGainNotFinite = 255;
inline constexpr int kKeyScaleNotFinite = 1023;
inline constexpr int kValueScaleNotFinite = 4095;

// Magnitude of pruned channels beside integer kept ones: largest * 2^((9 - r) / 4), r = 1..63; r =
// 0 is zero. 6 bits.
inline constexpr int kMaxRatio = 63;
inline constexpr int kRatioOne = 9;
static constexpr float RatioValue(int r) {
  if (r == 0) return 0.0f;
  const int quarter = kRatioOne - r + 64;  // quarters of an octave above 2^-16
  return kPow2Table[quarter % 4 * 16] *
         std::bit_cast<float>(uint32_t(quarter / 4 - 16 + 127) << 23);
}

// The scale word of a key row with integer kept channels.
static inline int KeyScaleOf(uint32_t word) { return int(word & 1023); }
static inline int RatioOf(uint32_t word) { return int(word >> 10); }
static inline uint32_t ScaleWord(int scale, int ratio) {
  return uint32_t(scale) | uint32_t(ratio) << 10;
}

}  // namespace sparkv

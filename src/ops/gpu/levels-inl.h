// What codes stand for, eight numbers of a lane at a time.
#pragma once

#include <bit>

#include "format/trellis.h"
#include "ops/gpu/platform.h"

namespace sparkv::gpu {

// Tiers of so many bits or fewer are multiplied as bytes.
inline constexpr int kMostByteBits = 3;

// Levels of eight numbers that a lane finds in words of planes: bits t, t + 4, .. of plane k are
// bit k of their codes. out[a]: number a and, in the high half, a + 4.
//   y = code - (h - 1/2),  level = y (linear + square |y|) to the nearest whole number
//   (docs/format.md).
// Up to five bits this is exact in f16 with these two factors: tested for every code.
struct LevelFactors {
  float linear, square;
};
constexpr LevelFactors kPairFactors[6] = {{0.0f, 0.0f},
                                          {38.53125f, 30.78125f},
                                          {16.4375f, 5.64453125f},
                                          {7.58984375f, 1.2412109375f},
                                          {3.61328125f, 0.29736328125f},
                                          {1.814453125f, 0.0704345703125f}};
constexpr uint32_t BothHalves(float x) {
  // f16 of a number that is one, above the subnormal ones.
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t half = (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
  return half | half << 16;
}

template <int kBits>
__device__ inline void Levels(const uint32_t (&plane)[kBits + 1], int t, uint32_t (&out)[4]) {
  constexpr float kCentre = float(1 << kBits) - 0.5f;
  // Field a of `low` is bits 4 a + 1 .. 4 a + 4, so that 512 + code can be written down as f16 with
  // a bit below it for the half in y; the upper bits of codes stand in `high` where they follow.
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int k = 0; k <= kBits; ++k) {
    const uint32_t turned = __funnelshift_l(plane[k], plane[k], (k + 1 - t) & 31);
    const uint32_t field = k % 4 == 3 ? 0x11111111u : 0x22222222u << (k % 4);
    if (k < 4)
      low |= turned & field;
    else
      high |= turned & field;
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    uint32_t y;
    if constexpr (kBits < 4) {
      const uint32_t pair_of_fields = a < 2 ? low : __funnelshift_r(low, low, 8);
      y = a % 2 == 0
              ? PairAdd(Pick<0x001e001e, 0x60006000>(pair_of_fields), BothHalves(-512.0f - kCentre))
              : PairFma(Pick<0x01e001e0, 0x60006000>(pair_of_fields),
                        BothHalves(0.0625f),  // 512 + 16 code
                        BothHalves(-32.0f - kCentre));
    } else {
      const uint32_t first = a == 0 ? low : __funnelshift_r(low, low, 4 * a);
      const uint32_t more = a == 0 ? high : __funnelshift_r(high, high, 4 * a);
      y = PairAdd(Pick<0x001e001e, 0x60006000>(first) | (more & 0x01e001e0u),
                  BothHalves(-512.0f - kCentre));
    }
    if constexpr (kBits <= 5) {
      constexpr LevelFactors f = kPairFactors[kBits];
      const uint32_t slope = PairFma(PairAbs(y), BothHalves(f.square), BothHalves(f.linear));
      // 1,536 + level has no room for a fraction.
      out[a] = PairAdd(PairFma(slope, y, BothHalves(1536.0f)), BothHalves(-1536.0f));
    } else {
      constexpr float kSquare = 0.55f * 1023.0f / kCentre / kCentre,
                      kLinear = 0.45f * 1023.0f / kCentre;
      constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
      const float low_y = LowOf(y), high_y = HighOf(y);
      const float low_level = fmaf(fmaf(fabsf(low_y), kSquare, kLinear), low_y, kWhole) - kWhole;
      const float high_level = fmaf(fmaf(fabsf(high_y), kSquare, kLinear), high_y, kWhole) - kWhole;
      out[a] = PairOf(low_level, high_level);
    }
  }
}

// The same for codes of up to four bits as signed bytes: out[i]: numbers 4 i .. 4 i + 3. Of four
// bits the levels below zero come apart, as magnitudes in `below`: a byte permutation looks up
// eight.
template <int kBits>
constexpr uint32_t FourLevels(int first, bool below) {
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    const int code = first + i, half = 1 << kBits;
    int level = 0;
    if (code < half) level = TrellisMagnitude(kBits, half - 1 - code) * (below ? 1 : -1);
    if (code >= half && code < 2 * half) level = TrellisMagnitude(kBits, code - half);
    four |= uint32_t(level & 255) << (8 * i);
  }
  return four;
}
template <int kBits>
__device__ inline void ByteLevels(const uint32_t (&plane)[kBits + 1], int t, uint32_t (&out)[2],
                                  uint32_t (&below)[2]) {
  static_assert(kBits <= kMostByteBits);
  uint32_t code = 0;
#pragma unroll
  for (int k = 0; k <= kBits; ++k)
    code |= __funnelshift_l(plane[k], plane[k], (k - t) & 31) & (0x11111111u << k);
  constexpr bool kApart = kBits == kMostByteBits;
  constexpr uint32_t kLow = FourLevels<kBits>(0, kApart), kNext = FourLevels<kBits>(4, kApart);
  if constexpr (!kApart) {
    out[0] = PickBytes(kLow, kNext, code);
    out[1] = PickBytes(kLow, kNext, code >> 16);
  } else {
    // A selector with its highest bit set gives the byte's highest bit eight times: 0, as
    // magnitudes have.
    constexpr uint32_t kThird = FourLevels<kBits>(8, true), kLast = FourLevels<kBits>(12, true);
    const uint32_t turned = code ^ 0x88888888u;
    out[0] = PickBytes(kThird, kLast, turned);
    out[1] = PickBytes(kThird, kLast, turned >> 16);
    below[0] = PickBytes(kLow, kNext, code);
    below[1] = PickBytes(kLow, kNext, code >> 16);
  }
}

}  // namespace sparkv::gpu

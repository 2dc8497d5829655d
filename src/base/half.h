// IEEE binary16 <-> binary32, round to nearest even. Same results as F16C and AVX-512 on every
// input but the payload of NaN, which becomes one quiet NaN, so that packed bytes do not depend on
// the instruction set.
//
// Helpers used by files compiled for one instruction set are static: a shared inline function would
// let the linker give AVX-512 code to a machine without it.
#pragma once

#include <bit>
#include <cstdint>

namespace sparkv {

static inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  // Exponents are aligned by one multiplication, which also normalises subnormals exactly.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

static inline uint16_t FloatToHalf(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u)
    return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 puts the rounding position at bit 0 of the float's significand.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | (magnitude >> 13));
}

}  // namespace sparkv

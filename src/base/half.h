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

static constexpr float HalfToFloat(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  // Exponents are aligned by one multiplication, which also normalises subnormals exactly.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// Choices, not branches: compilers turn a loop of these into vector code.
static inline uint16_t FloatToHalf(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal result: adding 0.5 puts the rounding position at bit 0 of the float's significand.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(((bits >> 16) & 0x8000u) | half);
}

}  // namespace sparkv

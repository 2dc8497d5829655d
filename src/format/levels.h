// Integer codes of kept key channels (docs/format.md, "key row"): a code stands for a whole number
// of 127ths of the row's largest magnitude, so that kernels may multiply bytes.
#pragma once

#include <cstdint>

#include "sparkv/sparkv.h"

namespace sparkv {

// Magnitude of the i-th level above zero, i = 0 .. 2^(bits - 1) - 1. Levels lie closer together
// near zero, because a few channels carry most of a key's size: x (0.7 + 0.3 x) with x = (i + 0.5)
// / (half - 0.5). int8 is fine enough to be linear; its last code repeats the one before it and is
// never written.
static constexpr int LevelMagnitude(sparkv_number number, int i) {
  if (number == SPARKV_INT8) return i < 126 ? i + 1 : 127;
  const double half = number == SPARKV_INT6 ? 32.0 : number == SPARKV_INT5 ? 16.0 : 8.0;
  const double x = (double(i) + 0.5) / (half - 0.5);
  return int(127.0 * x * (0.7 + 0.3 * x) + 0.5);
}
// Levels above zero that are written.
static constexpr int LevelCount(sparkv_number number) {
  return number == SPARKV_INT8 ? 127 : number == SPARKV_INT6 ? 32 : number == SPARKV_INT5 ? 16 : 8;
}
static constexpr int LevelHalf(sparkv_number number) {
  return number == SPARKV_INT8 ? 128 : LevelCount(number);
}
// Codes from half up are positive, from half - 1 down negative.
static constexpr int LevelOf(sparkv_number number, int code) {
  const int half = LevelHalf(number);
  return code >= half ? LevelMagnitude(number, code - half)
                      : -LevelMagnitude(number, half - 1 - code);
}
inline constexpr float kLevelUnit = 1.0f / 127.0f;

// Look-up tables of an integer type; made by the compiler.
struct Levels {
  int8_t level[256] = {};     // of a code
  uint8_t nearest[256] = {};  // i-th level above zero nearest to m / 2, m = ceil(2 |k| / unit); in
                              // the middle the smaller one
  explicit constexpr Levels(sparkv_number number) {
    for (int code = 0; code < 2 * LevelHalf(number); ++code)
      level[code] = int8_t(LevelOf(number, code));
    int i = 0;
    for (int m = 0; m < 256; ++m) {
      while (i < LevelCount(number) - 1 &&
             m > LevelMagnitude(number, i) + LevelMagnitude(number, i + 1))
        ++i;
      nearest[m] = uint8_t(i);
    }
  }
};

}  // namespace sparkv

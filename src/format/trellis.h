// Trellis-coded numbers (docs/method.md, section 13; Marcellin and Fischer 1990, with four states):
// a number of b bits takes one of 2^(b+1) levels, of which the state allows half. Twice as many
// levels for the same bits are worth 1 to 1.5 dB. Of the b bits of number i, bit 0 is the path bit
// p[i], the others are the upper bits of the level's code:
//   code = (bits >> 1) << 2 | c1 << 1 | c0,  c1 = p[i] ^ p[i-2],  c0 = p[i-1],  p[-1] = p[-2] = 0
// so a whole row of codes comes out of its path bits by two shifts, without a state.
#pragma once

#include <cstdint>

namespace sparkv {

inline constexpr int kMaxTrellisBits = 7;

// Levels are whole 127ths of the outermost one, from 6 bits on 1023rds, closer together near zero,
// as numbers about normal want it: magnitude i of h = 2^b is x (0.45 + 0.55 x) with x = (i + 0.5) /
// (h - 0.5). Part of the format: must never change.
static constexpr int TrellisTop(int bits) { return bits >= 6 ? 1023 : 127; }
static constexpr int TrellisMagnitude(int bits, int i) {
  const double x = (i + 0.5) / ((1 << bits) - 0.5);
  return int(TrellisTop(bits) * x * (0.45 + 0.55 * x) + 0.5);
}

// Levels of `bits` bits by code.
struct TrellisLevels {
  int n = 0;
  float top = 0.0f, inverse_top = 0.0f;  // level of the last code
  float best_top = 0.0f;                 // where it loses least, for numbers of deviation 1
  // Codes lose a part of the numbers themselves: <x, coded x> is 1 / lift of <x, x> for normal
  // ones.
  float lift = 1.0f;
  int16_t level[2 << kMaxTrellisBits] = {};

  constexpr TrellisLevels(int bits, float best, float lost)
      : n(2 << bits),
        top(float(TrellisTop(bits))),
        inverse_top(1.0f / float(TrellisTop(bits))),
        best_top(best),
        lift(lost) {
    for (int i = 0; i < n / 2; ++i) {
      level[n / 2 + i] = int16_t(TrellisMagnitude(bits, i));
      level[n / 2 - 1 - i] = int16_t(-TrellisMagnitude(bits, i));
    }
  }
};
inline constexpr TrellisLevels kTrellisLevels[kMaxTrellisBits + 1] = {
    {0, 1.0f, 1.0f},    {1, 1.226f, 1.23f}, {2, 1.857f, 1.065f}, {3, 2.33f, 1.025f},
    {4, 2.77f, 1.007f}, {5, 3.08f, 1.0f},   {6, 3.42f, 1.0f},    {7, 3.75f, 1.0f}};

}  // namespace sparkv

// How 32 rows of one head lie in a page, the unit in which a GPU stores and reads them
// (docs/format.md, "pages"). A page takes the bytes of its rows and holds the same bits in another
// order: a warp finds what its lanes multiply in whole words. Part of the format: must never
// change.
#pragma once

#include <cstdint>

#include "format/row_layout.h"

namespace sparkv {

inline constexpr int kPageRows = 32;

// Keys with tiers: | gains, bits 0..15: u16 [32] | gains, bits 16..23: u8 [32] | tier 0 | tier 1 |
// .. A tier is words [row / 16][row % 8][plane][j]: bit m of a half of word j is the bit of number
// j + J m of the tier, J = numbers of a tier / 16; rows 8 .. 15 of 16 have the high half. So the
// number before one of a word is at the same place of the word before it, but for j = 0.
inline constexpr uint32_t kKeyPageGains = 3 * kPageRows;
constexpr uint32_t TierWords(int per_tier, int bits) { return uint32_t(per_tier * bits); }

struct PageBit {
  uint32_t word;  // from where the planes begin
  int bit;
};
constexpr PageBit KeyPageBit(int per_tier, int bits, int row, int plane, int number) {
  const int words = per_tier / 16, j = number % words, m = number / words;
  return {uint32_t(((row / 16 * 8 + row % 8) * bits + plane) * words + j), 16 * (row / 8 % 2) + m};
}

// Trellis-coded values: | gains u8 [32] | words [plane][channel], bit r is that of row r |.
inline constexpr uint32_t kValuePageGains = kPageRows;
constexpr PageBit ValuePageBit(int head_dim, int row, int plane, int channel) {
  return {uint32_t(plane * head_dim + channel), row};
}

// All other rows: | what a row begins with (scales): u16 [32], none for f16 | numbers
// [row][channel] |.

// Head sizes whose rows may lie in pages: tiers are whole words in every plane.
constexpr bool PagesAllowed(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

}  // namespace sparkv

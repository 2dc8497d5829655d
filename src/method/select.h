// Which channels of a token are kept (docs/method.md, S4): the `kept` largest scores.
//
// Everything here is static: the file is compiled once per instruction set, and a shared inline
// function would let the linker give AVX-512 code to a machine without it. Integers only, so every
// instruction set selects the same channels.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace sparkv {

inline constexpr int kMaxSelect = 512;

namespace select_internal {

inline constexpr int kBlock = 64;

// Order of scores as integers: -0 equals 0, every NaN is the same and stands above infinity.
static inline int32_t RankKey(float score) {
  const int32_t magnitude = std::bit_cast<int32_t>(score) & 0x7fffffff;
  constexpr int32_t kNaN = 0x7f800001;
  return magnitude < kNaN ? magnitude : kNaN;
}

// Keys that are at least `bound`. key: [n_blocks * kBlock]
static inline int CountAtLeast(const int32_t* key, int n_blocks, int32_t bound) {
  int32_t count = 0;
  for (int b = 0; b < n_blocks; ++b) {
    for (int j = 0; j < kBlock; ++j) count += key[b * kBlock + j] >= bound ? 1 : 0;
  }
  return count;
}

// Bit i of the result is byte i of flags, each 0 or 1.
static inline uint64_t GatherBits(const uint8_t* flags) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= uint64_t(flags[8 * i + j]) << (8 * j);
    // Moves bit 8j to bit 56 + j; the other products fall outside the top byte.
    word |= (eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return word;
}

}  // namespace select_internal

// Sets bit j of mask_bits for the `kept` largest score[j]. A score is not negative, or NaN, which
// counts as largest. Of equal scores the smaller channel wins. Bits at and above n are 0. score:
// [n], n <= kMaxSelect; mask_bits: [(n + 63) / 64]
static inline void SelectTop(const float* score, int n, int kept, uint64_t* mask_bits) {
  using namespace select_internal;
  const int n_blocks = (n + kBlock - 1) / kBlock;
  if (kept <= 0) {
    for (int b = 0; b < n_blocks; ++b) mask_bits[b] = 0;
    return;
  }
  if (kept >= n) {
    for (int b = 0; b < n_blocks; ++b) mask_bits[b] = ~uint64_t{0};
    if (n % kBlock != 0) mask_bits[n_blocks - 1] = (uint64_t{1} << (n % kBlock)) - 1;
    return;
  }

  alignas(64) int32_t key[kMaxSelect];
  for (int j = 0; j < n; ++j) key[j] = RankKey(score[j]);
  for (int j = n; j < n_blocks * kBlock; ++j) key[j] = -1;  // below every bound that is tried

  int32_t low = 0, high = 0;
  for (int j = 0; j < n_blocks * kBlock; ++j) high = key[j] > high ? key[j] : high;
  ++high;
  // count(low) >= kept > count(high). Ends early at a bound that separates exactly, else at the
  // kept-th largest key.
  int count = n;
  while (high - low > 1 && count != kept) {
    const int32_t middle = low + (high - low) / 2;
    const int above = CountAtLeast(key, n_blocks, middle);
    if (above >= kept) {
      low = middle;
      count = above;
    } else {
      high = middle;
    }
  }

  for (int b = 0; b < n_blocks; ++b) {
    uint8_t flags[kBlock];
    for (int j = 0; j < kBlock; ++j) flags[j] = key[b * kBlock + j] >= low ? 1 : 0;
    mask_bits[b] = GatherBits(flags);
  }
  // Ties at the border: drop the largest channels among those that equal it.
  for (int j = n - 1; count > kept; --j) {
    if (key[j] != low) continue;
    mask_bits[j / kBlock] &= ~(uint64_t{1} << (j % kBlock));
    --count;
  }
}

}  // namespace sparkv

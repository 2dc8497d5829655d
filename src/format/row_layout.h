// What the bytes of a packed row are (docs/format.md, same order, same names). The only file that
// knows where a bit lies. Rows are stored one after the other without padding; the row of token i
// is at base + i * bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/tier_bits.h"
#include "sparkv/sparkv.h"

namespace sparkv {

inline constexpr int kMaxHeadDim = 512;
static inline bool HeadDimAllowed(int head_dim) {
  return head_dim >= 32 && head_dim <= kMaxHeadDim && head_dim % 8 == 0;
}

// Bits of a number type's code; 16 for f16.
static constexpr int NumberBits(sparkv_number number) {
  switch (number) {
    case SPARKV_INT8:
      return 8;
    case SPARKV_INT6:
      return 6;
    case SPARKV_INT5:
      return 5;
    case SPARKV_INT4:
      return 4;
    default:
      return 16;
  }
}

// Bits per number of quarter `tier` of the channels, 0 where the number type has no tiers. Their
// sum is fixed; how a head shares it among its tiers is in its weights (KeyLayout::Under).
static inline int TierBits(sparkv_number number, int tier) {
  static constexpr int kBits[][4] = {
      {7, 5, 4, 3}, {7, 4, 3, 2}, {6, 3, 2, 1}, {5, 3, 2, 1}, {4, 2, 1, 0}};
  return number >= SPARKV_TIERS_7543 && number <= SPARKV_TIERS_4210
             ? kBits[number - SPARKV_TIERS_7543][tier]
             : 0;
}
// Bits per number of trellis-coded values, 0 for others.
static constexpr int TrellisBits(sparkv_number number) {
  return number >= SPARKV_TRELLIS4 && number <= SPARKV_TRELLIS1 ? 4 - (number - SPARKV_TRELLIS4)
                                                                : 0;
}

inline constexpr int kMaxPlanes = 7;

// The codes of trellis-coded numbers, as planes: bit i of plane p is bit p of number i, its path
// bit in plane 0 (format/trellis.h). Only the first `numbers[p]` numbers have a bit p.
struct PlaneLayout {
  int n_planes = 0;
  int numbers[kMaxPlanes] = {};
  uint32_t at[kMaxPlanes] = {};  // byte offset in the row
  uint32_t end = 0;

  bool operator==(const PlaneLayout&) const = default;

  // `n_tiers` runs of `per_tier` numbers; bits of a run, not rising.
  template <typename Bits>
  static constexpr PlaneLayout Make(uint32_t begin, int n_tiers, int per_tier, Bits&& bits) {
    PlaneLayout l;
    l.n_planes = bits(0);
    l.end = begin;
    for (int p = 0; p < l.n_planes; ++p) {
      for (int t = 0; t < n_tiers && bits(t) > p; ++t) l.numbers[p] += per_tier;
      l.at[p] = l.end;
      l.end += (uint32_t(l.numbers[p]) + 7) / 8;
    }
    return l;
  }
};

// A packed key row of one head, with tiers: | gains | planes |
//   gains   3 bytes: 6 bits per tier from bit 0, TierGainGrid code of what the outermost level is
//   planes  plane 0, then 1, ...
// and with any other number type: | scale | mask | signs | low codes | high codes |
//   scale  u16: bits 0..9 KeyScaleGrid code of the largest kept |k|, bits 10..15 the pruned
//   magnitude as a ratio to it
//          (integer kept);
//          u8: MeanGrid code of the pruned magnitude (f16 kept, recovered); absent for f16 kept
//          that restore nothing
//   mask   head_dim bits, bit j = channel j is kept; absent when all or none are
//   signs  one bit per pruned channel in channel order, 1 = positive; absent when pruned channels
//   restore to zero codes  kept channels in channel order: f16 as they are; int8: a byte; int6,
//   int5, int4: low 4 bits as nibbles (even rank
//          in the low half), then the other 2 or 1 bits, packed from bit 0
struct KeyLayout {
  int head_dim = 0, kept = 0, pruned = 0;
  sparkv_number number = SPARKV_F16;
  sparkv_recover recover = SPARKV_RECOVER_ZERO;
  uint32_t scale_bytes = 0, mask_bytes = 0, sign_bytes = 0, low_bytes = 0, high_bytes = 0;
  uint32_t mask_at = 0, sign_at = 0, low_at = 0, high_at = 0;
  uint32_t bytes = 0;
  int tier_bits[kTiers] = {};  // of a number of each tier, not rising; 0 in all: no tiers
  PlaneLayout planes;          // with tiers

  bool tiered() const { return tier_bits[0] > 0; }
  int per_tier() const { return head_dim / kTiers; }
  bool restores() const { return recover != SPARKV_RECOVER_ZERO && pruned > 0; }
  // Weights decide which channels are pruned and restore them, or which are in which tier.
  bool needs_table() const { return pruned > 0 || tiered(); }

  static KeyLayout Make(int head_dim, int kept, sparkv_number number, sparkv_recover recover) {
    KeyLayout l;
    l.head_dim = head_dim;
    l.kept = kept;
    l.pruned = head_dim - kept;
    l.number = number;
    l.recover = recover;
    const uint32_t t = uint32_t(kept);
    for (int tier = 0; tier < kTiers; ++tier) l.tier_bits[tier] = TierBits(number, tier);
    if (l.tiered()) {
      l.scale_bytes = l.mask_at = l.sign_at = l.low_at = 3;
      l.PlacePlanes();
      l.bytes = l.high_at = l.planes.end;
      l.low_bytes = l.bytes - l.low_at;
      return l;
    }
    if (number == SPARKV_F16) {
      l.scale_bytes = l.restores() ? 1 : 0;
    } else {
      l.scale_bytes = 2;
    }
    l.mask_bytes = kept > 0 && l.pruned > 0 ? uint32_t(head_dim) / 8 : 0;
    l.sign_bytes = l.restores() ? (uint32_t(l.pruned) + 7) / 8 : 0;
    switch (number) {
      case SPARKV_F16:
        l.low_bytes = 2 * t;
        break;
      case SPARKV_INT8:
        l.low_bytes = t;
        break;
      case SPARKV_INT6:
        l.low_bytes = (t + 1) / 2;
        l.high_bytes = (t + 3) / 4;
        break;
      case SPARKV_INT5:
        l.low_bytes = (t + 1) / 2;
        l.high_bytes = (t + 7) / 8;
        break;
      case SPARKV_INT4:
        l.low_bytes = (t + 1) / 2;
        break;
      default:
        break;
    }
    l.mask_at = l.scale_bytes;
    l.sign_at = l.mask_at + l.mask_bytes;
    l.low_at = l.sign_at + l.sign_bytes;
    l.high_at = l.low_at + l.low_bytes;
    l.bytes = l.high_at + l.high_bytes;
    return l;
  }

  bool operator==(const KeyLayout&) const = default;

  // Where the bits lie that a head with these weights (f16, as tables hold them) writes: rows of
  // one number type take the same bytes under all weights, the last of them zero if need be.
  KeyLayout Under(const uint16_t* weights) const {
    if (!tiered()) return *this;
    KeyLayout l = *this;
    int fall[kTiers - 1], sum = 0;
    for (const int bits : tier_bits) sum += bits;
    for (int tier = 0; tier < kTiers - 1; ++tier) fall[tier] = TierFall(weights, tier);
    ShareBits(fall, sum, l.tier_bits);
    l.PlacePlanes();
    return l.planes.end <= bytes ? l : *this;  // planes end in whole bytes
  }

 private:
  void PlacePlanes() {
    planes = PlaneLayout::Make(low_at, kTiers, per_tier(), [&](int t) { return tier_bits[t]; });
  }
};

// A packed value row of one head: f16 as it is, or trellis-coded | gain u8, ValueGainGrid code |
// planes |, or | scale u16 (bits 0..11 ValueScaleGrid code of
// the largest rotated |x|, bits 12..15 zero) | codes: int8 a byte each, int4 nibbles (even channel
// in the low half) |, rotated by RotationBlock.
struct ValueLayout {
  int head_dim = 0;
  sparkv_number number = SPARKV_F16;
  uint32_t scale_bytes = 0, code_bytes = 0, bytes = 0;
  PlaneLayout planes;  // when trellis-coded

  constexpr bool trellis() const { return TrellisBits(number) > 0; }
  bool rotated() const { return number != SPARKV_F16; }

  static constexpr ValueLayout Make(int head_dim, sparkv_number number) {
    ValueLayout l;
    l.head_dim = head_dim;
    l.number = number;
    l.scale_bytes = number == SPARKV_F16 ? 0 : l.trellis() ? 1 : 2;
    if (l.trellis()) {
      l.planes =
          PlaneLayout::Make(l.scale_bytes, 1, head_dim, [&](int) { return TrellisBits(number); });
      l.bytes = l.planes.end;
      l.code_bytes = l.bytes - l.scale_bytes;
      return l;
    }
    l.code_bytes = uint32_t(head_dim) * uint32_t(NumberBits(number)) / 8;
    l.bytes = l.scale_bytes + l.code_bytes;
    return l;
  }
};

// Weights of one head as the kernels read them, [3][head_dim] f32 (docs/format.md, "weights"):
// channels are ranked by |k| * weight; a pruned one is restored as sign * magnitude * restore.
// weight = 1 / restore, 0 where restore is 0. order: the channels tier by tier, in whole numbers.
struct KeyWeights {
  const float *restore, *weight, *order;
  KeyWeights(const float* table, int head_dim)
      : restore(table), weight(table + head_dim), order(table + 2 * head_dim) {}
};
inline constexpr int kWeightParts = 3;
// Value rows are rotated in blocks of the largest power of two that divides the head size (64: one
// block; 96: three of 32).
static constexpr int RotationBlock(int head_dim) { return head_dim & -head_dim; }

}  // namespace sparkv

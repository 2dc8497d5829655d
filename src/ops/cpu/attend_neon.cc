// NEON, as every 64-bit ARM has it.
#include <arm_neon.h>

#include "ops/cpu/inl.h"

namespace sparkv::neon {
#include "ops/cpu/row-inl.h"
#include "ops/cpu/spread-inl.h"
#include "ops/cpu/trellis-inl.h"

constexpr int kVec = 4;
constexpr int kColVecs = 4;  // 6 rows x 4 accumulators of 32 registers

struct Eight {
  float32x4_t low, high;
};

inline Eight Halves(uint16x8_t h) {
  const float16x8_t x = vreinterpretq_f16_u16(h);
  return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}
inline Eight Floats(int8x8_t x) {
  const int16x8_t wide = vmovl_s8(x);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
inline Eight Floats(uint8x8_t x) {
  const uint16x8_t wide = vmovl_u8(x);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))};
}
inline Eight Select(uint8x8_t mask, Eight yes, Eight no) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(mask));
  return {vbslq_f32(vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(wide))), yes.low, no.low),
          vbslq_f32(vreinterpretq_u32_s32(vmovl_high_s16(wide)), yes.high, no.high)};
}
inline void Put(float* out, Eight x) {
  vst1q_f32(out, x.low);
  vst1q_f32(out + 4, x.high);
}
inline uint16x8_t LoadHalves(const uint8_t* p) { return vreinterpretq_u16_u8(vld1q_u8(p)); }

// Bytes of ones where a bit of `bits` is set.
inline uint8x8_t ByteMask(unsigned bits) {
  return vtst_u8(vdup_n_u8(uint8_t(bits)), vcreate_u8(0x8040201008040201u));
}

bool HalfBytes(const uint8_t* half, int n, float* out) {
  uint16x8_t largest = vdupq_n_u16(0);
  for (int j = 0; j < n; j += 8) {
    const uint16x8_t h = LoadHalves(half + 2 * j);
    largest = vmaxq_u16(largest, vandq_u16(h, vdupq_n_u16(0x7fff)));
    Put(out + j, Halves(h));
  }
  return vmaxvq_u16(largest) < 0x7c00u;
}

bool HalfRow(const uint16_t* half, int n, float* out) {
  return HalfBytes(reinterpret_cast<const uint8_t*>(half), n, out);
}

// Levels of all kept channels as signed bytes.
inline void LevelBytes(const KeyLayout& layout, const uint8_t* row, int8_t* levels) {
  const int8_t* table = LevelsOf(layout.number).level;
  if (layout.number == SPARKV_INT8) {
    for (int i = 0; i < layout.kept; ++i) levels[i] = table[row[layout.low_at + unsigned(i)]];
    return;
  }
  const int8x16x4_t all = vld1q_s8_x4(table);
  for (int first = 0; first < layout.kept; first += 8) {
    uint32_t word;
    std::memcpy(&word, row + layout.low_at + first / 2, 4);
    const uint8x8_t pairs = vcreate_u8(word);
    uint8x8_t code = vzip1_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    if (layout.number == SPARKV_INT5) {
      const uint8x8_t bit = ByteMask(row[layout.high_at + unsigned(first) / 8]);
      code = vorr_u8(code, vand_u8(bit, vdup_n_u8(16)));
    } else if (layout.number == SPARKV_INT6) {
      // Four codes to a byte, two bits each: shifted by 4, 2, 0, -2 they are bits 4 and 5.
      const uint8_t* high = row + layout.high_at + first / 4;
      const uint8x8_t bytes =
          vcreate_u8(0x01010101u * uint64_t(high[0]) | (0x01010101u * uint64_t(high[1])) << 32);
      const int8x8_t places = vcreate_s8(0xfe000204fe000204u);
      code = vorr_u8(code, vand_u8(vshl_u8(bytes, places), vdup_n_u8(0x30)));
    }
    vst1_s8(levels + first, vqtbl4_s8(all, code));
  }
}

void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  if (layout.tiered()) return TierRow(layout, row, out, TrellisNumbers);
  const int n = layout.head_dim;
  const uint8_t* halves = row + layout.low_at;
  if (layout.pruned == 0 && layout.number == SPARKV_F16) {
    HalfBytes(halves, n, out);
    return;
  }
  const bool integers = layout.number != SPARKV_F16;
  int8_t levels[kMaxHeadDim + 8];
  if (integers) LevelBytes(layout, row, levels);
  const float unit = integers ? LargestKept(row) * kLevelUnit : 0.0f;
  const KeyWeights w(table, n);
  const float32x4_t plus = vdupq_n_f32(PrunedMagnitude(layout, row)), minus = vnegq_f32(plus);
  unsigned rank = 0, pruned_rank = 0;
  for (int j = 0; j < n; j += 8) {
    const unsigned mask = MaskByte(layout, row, j);
    const uint8x8_t ranks = vld1_u8(Spread(mask));
    Eight pruned = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    if (layout.pruned > 0) {
      uint8x8_t positive = vdup_n_u8(0);
      if (layout.sign_bytes != 0) {
        positive = vtbl1_u8(ByteMask(Bits8At(row + layout.sign_at, pruned_rank)),
                            vld1_u8(Spread(~mask & 255u)));
      }
      pruned = Select(positive, {plus, plus}, {minus, minus});
      pruned.low = vmulq_f32(pruned.low, vld1q_f32(w.restore + j));
      pruned.high = vmulq_f32(pruned.high, vld1q_f32(w.restore + j + 4));
    }
    Eight kept;
    if (integers) {
      kept = Floats(vtbl1_s8(vld1_s8(levels + rank), vreinterpret_s8_u8(ranks)));
      kept.low = vmulq_n_f32(kept.low, unit);
      kept.high = vmulq_n_f32(kept.high, unit);
    } else {
      // Bytes of the half at rank r are 2r and 2r + 1.
      const uint8x8_t twice = vadd_u8(ranks, vand_u8(ranks, vdup_n_u8(0x7f)));
      const uint8x16_t pairs = vcombine_u8(vzip1_u8(twice, vadd_u8(twice, vdup_n_u8(1))),
                                           vzip2_u8(twice, vadd_u8(twice, vdup_n_u8(1))));
      kept = Halves(vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(halves + 2 * rank), pairs)));
    }
    Put(out + j, Select(ByteMask(mask), kept, pruned));
    const unsigned kept_here = unsigned(std::popcount(mask));
    rank += kept_here;
    pruned_rank += 8 - kept_here;
  }
}

bool ValueRow(const ValueLayout& layout, const uint8_t* row, float* out) {
  if (layout.trellis()) return TrellisValue(layout, row, out, TrellisNumbers);
  const int n = layout.head_dim;
  if (layout.number == SPARKV_F16) return HalfBytes(row, n, out);
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const uint8_t* code = row + layout.scale_bytes;
  const bool bytes = layout.number == SPARKV_INT8;
  const float top = ValueScaleGrid::Value(e), step = top / (bytes ? 127.5f : 7.5f);
  for (int j = 0; j < n; j += 8) {
    uint8x8_t x;
    if (bytes) {
      x = vld1_u8(code + j);
    } else {
      uint32_t word;
      std::memcpy(&word, code + j / 2, 4);
      const uint8x8_t pairs = vcreate_u8(word);
      x = vzip1_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    }
    const Eight f = Floats(x);
    Put(out + j, {vfmaq_n_f32(vdupq_n_f32(-top), f.low, step),
                  vfmaq_n_f32(vdupq_n_f32(-top), f.high, step)});
  }
  return true;
}

#include "ops/cpu/attend-inl.h"
#include "ops/cpu/unpack-first-inl.h"
}  // namespace sparkv::neon

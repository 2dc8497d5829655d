// Plain C++: what every machine can run, and the easiest to read.
#include "ops/cpu/inl.h"

namespace sparkv::plain {
#include "ops/cpu/row-inl.h"
#include "ops/cpu/trellis-inl.h"

constexpr int kVec = 4;
constexpr int kColVecs = 2;

bool HalfRow(const uint16_t* half, int n, float* out) {
  uint16_t largest = 0;
  for (int j = 0; j < n; ++j) {
    out[j] = HalfToFloat(half[j]);
    const uint16_t magnitude = half[j] & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7c00u;
}

void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  if (layout.tiered()) return TierRow(layout, row, out, TrellisNumbers);
  const uint8_t* codes = row + layout.low_at;
  const bool integers = layout.number != SPARKV_F16;
  if (layout.pruned == 0 && !integers) {
    for (int j = 0; j < layout.head_dim; ++j) {
      uint16_t half;
      std::memcpy(&half, codes + 2 * size_t(j), 2);
      out[j] = HalfToFloat(half);
    }
    return;
  }
  const KeyWeights w(table, layout.head_dim);
  const float magnitude = PrunedMagnitude(layout, row);
  const float unit = integers ? LargestKept(row) * kLevelUnit : 0.0f;
  const int8_t* levels = LevelsOf(layout.number).level;
  int rank = 0, pruned_rank = 0;
  for (int j = 0; j < layout.head_dim; ++j) {
    if (MaskBit(layout, row, j)) {
      if (integers) {
        out[j] = float(levels[GetCode(layout, row, rank)]) * unit;
      } else {
        uint16_t half;
        std::memcpy(&half, codes + 2 * size_t(rank), 2);
        out[j] = HalfToFloat(half);
      }
      ++rank;
    } else {
      const int at = pruned_rank++;
      const bool positive =
          layout.sign_bytes != 0 && (row[layout.sign_at + unsigned(at) / 8] >> (at % 8) & 1);
      out[j] = (positive ? magnitude : -magnitude) * w.restore[j];
    }
  }
}

bool ValueRow(const ValueLayout& layout, const uint8_t* row, float* out) {
  if (layout.trellis()) return TrellisValue(layout, row, out, TrellisNumbers);
  if (layout.number == SPARKV_F16) {
    alignas(64) uint16_t half[kMaxHeadDim];
    std::memcpy(half, row, layout.bytes);
    return HalfRow(half, layout.head_dim, out);
  }
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const uint8_t* code = row + layout.scale_bytes;
  if (layout.number == SPARKV_INT8) {
    const float step = ValueScaleGrid::Value(e) / 127.5f;
    for (int j = 0; j < layout.head_dim; ++j) out[j] = (float(code[j]) - 127.5f) * step;
  } else {
    const float step = ValueScaleGrid::Value(e) / 7.5f;
    for (int j = 0; j < layout.head_dim / 2; ++j) {
      out[2 * j] = (float(code[j] & 15) - 7.5f) * step;
      out[2 * j + 1] = (float(code[j] >> 4) - 7.5f) * step;
    }
  }
  return true;
}

#include "ops/cpu/attend-inl.h"
#include "ops/cpu/unpack-first-inl.h"
}  // namespace sparkv::plain

// Packing and exact unpacking of rows. Compiled once per instruction set without contraction of
// floating-point expressions: every sum has a fixed order, so all of them write the same bytes.
// Included inside a namespace per instruction set.
//
// Idempotence: Pack(RoundToHalf(Unpack(row))) == row under the same table. It rests on (1) scales
// on logarithmic grids with a tolerance wider than the rounding of f16, (2) the largest magnitude
// always taking the top code, (3) every kept magnitude staying above the pruned one, so that the
// same channels are selected again.

constexpr int kLanes16 = 16;
constexpr float kKeyTolerance = 0x1p-8f;
constexpr float kValueTolerance = 0x1p-9f;
constexpr int kSettle = 24;  // rounds of pack and unpack for rows near the ends of f16's range

inline void PutCode(const KeyLayout& layout, uint8_t* row, int rank, int code) {
  uint8_t* low = row + layout.low_at;
  uint8_t* high = row + layout.high_at;
  switch (layout.number) {
    case SPARKV_INT8:
      low[rank] = uint8_t(code);
      break;
    case SPARKV_INT6:
      high[rank / 4] = uint8_t(high[rank / 4] | (code >> 4) << (rank % 4 * 2));
      [[fallthrough]];
    case SPARKV_INT4:
      low[rank / 2] = uint8_t(low[rank / 2] | (code & 15) << (rank % 2 * 4));
      break;
    case SPARKV_INT5:
      high[rank / 8] = uint8_t(high[rank / 8] | (code >> 4) << (rank % 8));
      low[rank / 2] = uint8_t(low[rank / 2] | (code & 15) << (rank % 2 * 4));
      break;
    default:
      break;
  }
}

inline void PutScale(uint8_t* row, uint32_t scale) {
  row[0] = uint8_t(scale);
  row[1] = uint8_t(scale >> 8);
}

inline uint16_t Saturate(float x) {
  // A recovered channel must not turn into infinity because its weight is small.
  if (x > 65504.0f) x = 65504.0f;
  if (x < -65504.0f) x = -65504.0f;
  return FloatToHalf(x);
}

#include "ops/cpu/pack_trellis-inl.h"

void UnpackKey(const KeyLayout& layout, const float* table, const uint8_t* row, uint16_t* k) {
  if (layout.tiered()) return UnpackTiers(layout, table, row, k);
  if (layout.pruned == 0 && layout.number == SPARKV_F16) {
    std::memcpy(k, row + layout.low_at, 2 * size_t(layout.head_dim));
    return;
  }
  const KeyWeights w(table, layout.head_dim);
  const float magnitude = PrunedMagnitude(layout, row);
  const bool integers = layout.number != SPARKV_F16;
  const float unit = integers ? LargestKept(row) * kLevelUnit : 0.0f;
  const int8_t* levels = LevelsOf(layout.number).level;
  int rank = 0, pruned_rank = 0;
  for (int j = 0; j < layout.head_dim; ++j) {
    float y = 0.0f;
    if (MaskBit(layout, row, j)) {
      const int at = rank++;
      if (!integers) {
        std::memcpy(&k[j], row + layout.low_at + 2 * size_t(at), 2);
        continue;
      }
      y = float(levels[GetCode(layout, row, at)]) * unit;
    } else {
      const int at = pruned_rank++;
      if (layout.sign_bytes != 0) {
        const bool positive = row[layout.sign_at + unsigned(at) / 8] >> (at % 8) & 1;
        y = magnitude * w.restore[j];
        if (!positive) y = -y;
      }
    }
    k[j] = Saturate(y);
    if (k[j] == 0x8000u) k[j] = 0;
  }
}

// One pass; *fragile is set when f16 rounding of the unpacked row may exceed what the grids
// tolerate.
inline void PackKeyOnce(const KeyLayout& layout, const float* table, const uint16_t* k,
                        uint8_t* row, bool* fragile) {
  const int n = layout.head_dim;
  std::memset(row, 0, layout.bytes);
  if (layout.pruned == 0 && layout.number == SPARKV_F16) {
    std::memcpy(row + layout.low_at, k, 2 * size_t(n));
    return;
  }
  const KeyWeights w(table, n);  // not read when nothing is pruned
  alignas(64) float value[kMaxHeadDim];
  alignas(64) float score[kMaxHeadDim];
  uint64_t mask[kMaxHeadDim / 64] = {};
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    value[j] = HalfToFloat(k[j]);
    score[j] = layout.pruned > 0 ? std::fabs(value[j]) * w.weight[j] : 0.0f;
    finite &= (k[j] & 0x7c00u) != 0x7c00u;
  }
  if (!finite) {
    for (int j = 0; j < n; ++j) {
      if ((k[j] & 0x7c00u) == 0x7c00u) score[j] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  SelectTop(score, n, layout.kept, mask);
  const auto kept = [&](int j) { return (mask[j / 64] >> (j % 64) & 1) != 0; };
  if (layout.mask_bytes != 0) std::memcpy(row + layout.mask_at, mask, layout.mask_bytes);

  float threshold = std::numeric_limits<float>::infinity();
  for (int j = 0; j < n; ++j) threshold = kept(j) && score[j] < threshold ? score[j] : threshold;

  // c = mean of the pruned z^2 (reference) or |z| (paper), z = |k| * weight, strictly below the
  // threshold; channels without weight do not count.
  float magnitude = 0.0f;
  if (layout.restores()) {
    const bool square = layout.recover == SPARKV_RECOVER_MEAN;
    float sum[kLanes16] = {}, count[kLanes16] = {};
    for (int j0 = 0; j0 < n; j0 += kLanes16) {
      for (int lane = 0; lane < kLanes16; ++lane) {
        const int j = j0 + lane;
        if (j >= n) break;
        const bool counts = !kept(j) && score[j] < threshold && w.weight[j] > 0.0f;
        const float x = square ? score[j] * score[j] : score[j];
        sum[lane] += counts ? x : 0.0f;
        count[lane] += counts ? 1.0f : 0.0f;
      }
    }
    for (int half = kLanes16 / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        sum[lane] += sum[lane + half];
        count[lane] += count[lane + half];
      }
    }
    magnitude = count[0] > 0.0f ? sum[0] / count[0] : 0.0f;
    if (square) magnitude = std::sqrt(magnitude);
    if (!std::isfinite(magnitude)) magnitude = 0.0f;
  }

  float unit = 0.0f;  // smallest distance between two levels
  if (layout.number == SPARKV_F16) {
    int rank = 0;
    for (int j = 0; j < n; ++j) {
      if (kept(j)) std::memcpy(row + layout.low_at + 2 * size_t(rank++), &k[j], 2);
    }
    if (layout.restores()) {
      int e = MeanGrid::Nearest(magnitude);
      while (e > 0 && MeanGrid::Value(e) * (1.0f + kKeyTolerance) >= threshold) --e;
      row[0] = uint8_t(e);
    }
  } else if (layout.kept == 0) {
    const int scale = KeyScaleGrid::Nearest(magnitude);
    PutScale(row, ScaleWord(scale, scale > 0 ? kRatioOne : 0));
  } else if (!finite) {
    // NaN stays in its own token: kept channels unpack to NaN, pruned ones to zero.
    PutScale(row, ScaleWord(kKeyScaleNotFinite, 0));
    return;
  } else {
    float largest = 0.0f;
    int largest_at = -1;
    for (int j = 0; j < n; ++j) {
      if (kept(j) && std::fabs(value[j]) > largest) {
        largest = std::fabs(value[j]);
        largest_at = j;
      }
    }
    const int scale = KeyScaleGrid::Ceil(largest, kKeyTolerance);
    const float top = KeyScaleGrid::Value(scale);
    int ratio = 0;
    if (magnitude > 0.0f && scale > 0) {
      ratio = 1;
      while (ratio < kMaxRatio &&
             top * RatioValue(ratio) * (top * RatioValue(ratio + 1)) > magnitude * magnitude)
        ++ratio;
      while (ratio <= kMaxRatio && top * RatioValue(ratio) >= threshold) ++ratio;
      if (ratio > kMaxRatio || magnitude < 0.5f * top * RatioValue(kMaxRatio)) ratio = 0;
    }
    const int half = LevelHalf(layout.number), last = LevelCount(layout.number) - 1;
    const int8_t* levels = LevelsOf(layout.number).level + half;
    const uint8_t* nearest = LevelsOf(layout.number).nearest;
    const float step = top * kLevelUnit;
    unit = float(levels[1] - levels[0]) * step;
    // Again with a smaller pruned magnitude when a kept channel cannot be put above it.
    for (bool above = scale == 0; !above;
         ratio = above || ratio == 0 ? ratio : (ratio + 1) % (kMaxRatio + 1)) {
      above = true;
      std::memset(row + layout.low_at, 0, layout.low_bytes + layout.high_bytes);
      const float at_least = top * RatioValue(ratio) * (1.0f + kKeyTolerance);
      int rank = 0;
      for (int j = 0; j < n; ++j) {
        if (!kept(j)) continue;
        const float twice = 2.0f * (std::fabs(value[j]) / step);
        const int floor = twice < 255.0f ? int(twice) : 255;
        const int ceil = floor + (floor < 255 && float(floor) < twice ? 1 : 0);
        int level = j == largest_at ? last : nearest[ceil];
        if (ratio > 0) {
          while (level < last && float(levels[level]) * step * w.weight[j] <= at_least) ++level;
          if (float(levels[level]) * step * w.weight[j] <= at_least) above = false;
        }
        PutCode(layout, row, rank++, value[j] < 0.0f ? half - 1 - level : half + level);
      }
    }
    PutScale(row, ScaleWord(scale, ratio));
  }

  // Fragile: near the ends of its range f16 rounds coarsely.
  const float restored = PrunedMagnitude(layout, row);
  int rank = 0;
  for (int j = 0; j < n; ++j) {
    if (kept(j)) {
      if (layout.number == SPARKV_F16) continue;
      if (unit < 0x1p-18f || unit * 512.0f > 65000.0f) *fragile = true;
      continue;
    }
    const int at = rank++;
    if (layout.sign_bytes == 0) continue;
    const float x = restored * w.restore[j];
    if (x < 0x1p-12f || x > 65000.0f) *fragile = true;
    // A channel that unpacks to zero has no sign: its bit is 0.
    if (Saturate(x) != 0 && value[j] > 0.0f)
      row[layout.sign_at + unsigned(at) / 8] |= uint8_t(1u << (at % 8));
  }
}

// Packs what the row unpacks to until the bytes stay the same.
inline bool Settle(const KeyLayout& layout, const float* table, uint8_t* row) {
  bool fragile = false;
  for (int round = 0; round < kSettle; ++round) {
    uint16_t unpacked[kMaxHeadDim];
    uint8_t again[2 * kMaxHeadDim + 128];
    UnpackKey(layout, table, row, unpacked);
    PackKeyOnce(layout, table, unpacked, again, &fragile);
    if (std::memcmp(row, again, layout.bytes) == 0) return true;
    std::memcpy(row, again, layout.bytes);
  }
  return false;
}

inline void PackKey(const KeyLayout& layout, const float* table, const uint16_t* k, uint8_t* row) {
  bool fragile = false;
  PackKeyOnce(layout, table, k, row, &fragile);
  if (!fragile || Settle(layout, table, row)) return;
  // f16 is too coarse for the pruned channels: they unpack to zero, which is exact.
  if (layout.sign_bytes != 0) std::memset(row + layout.sign_at, 0, layout.sign_bytes);
  if (layout.number == SPARKV_F16) {
    if (layout.scale_bytes != 0) row[0] = 0;
  } else {
    PutScale(row, ScaleWord(layout.kept > 0 ? KeyScaleOf(GetScale(row)) : 0, 0));
  }
  Settle(layout, table, row);
}

void PackKeys(const KeyLayout& layout, int n_rows, const float* const* tables,
              const uint16_t* const* k, uint8_t* const* rows) {
  if (layout.tiered()) return PackTiers(layout, n_rows, tables, k, rows);
  for (int r = 0; r < n_rows; ++r) PackKey(layout, tables[r], k[r], rows[r]);
}

void UnpackValue(const ValueLayout& layout, const uint8_t* row, uint16_t* v) {
  const int n = layout.head_dim;
  if (layout.number == SPARKV_F16) {
    std::memcpy(v, row, 2 * size_t(n));
    return;
  }
  alignas(64) float x[kMaxHeadDim];
  const int e = layout.trellis() ? row[0] : int(GetScale(row) & 4095);
  if (e == (layout.trellis() ? kValueGainNotFinite : kValueScaleNotFinite)) {
    for (int j = 0; j < n; ++j) v[j] = 0x7e00u;
    return;
  }
  if (layout.trellis()) {
    const float unit =
        ValueGainGrid::Value(e) * kTrellisLevels[TrellisBits(layout.number)].inverse_top;
    TrellisNumbers(RunsOf(layout), row, &unit, x);
  } else {
    const bool bytes = layout.number == SPARKV_INT8;
    const float centre = bytes ? 127.5f : 7.5f;
    const float step = ValueScaleGrid::Value(e) / centre;
    const uint8_t* code = row + layout.scale_bytes;
    alignas(64) uint8_t codes[kMaxHeadDim];
    if (bytes) {
      std::memcpy(codes, code, size_t(n));
    } else {
      for (int j = 0; j < n; ++j) codes[j] = uint8_t(code[j / 2] >> (j % 2 * 4) & 15);
    }
    for (int j = 0; j < n; ++j) x[j] = (float(codes[j]) - centre) * step;
  }
  Rotate(x, n, RotationBlock(n));
  for (int j = 0; j < n; ++j) {
    v[j] = Saturate(x[j]);
    if (v[j] == 0x8000u) v[j] = 0;
  }
}

inline void PackValueOnce(const ValueLayout& layout, const uint16_t* v, uint8_t* row,
                          bool* fragile) {
  const int n = layout.head_dim;
  std::memset(row, 0, layout.bytes);
  if (layout.number == SPARKV_F16) {
    std::memcpy(row, v, 2 * size_t(n));
    return;
  }
  alignas(64) float x[kMaxHeadDim];
  if (!HalfFloats(v, n, x)) return PutScale(row, kValueScaleNotFinite);
  Rotate(x, n, RotationBlock(n));
  float in_lane[kLanes16] = {};
  for (int j = 0; j < n; ++j) {
    float& most = in_lane[j % kLanes16];
    most = std::max(most, std::fabs(x[j]));
  }
  const float largest = *std::max_element(in_lane, in_lane + kLanes16);
  int largest_at = 0;
  while (std::fabs(x[largest_at]) < largest) ++largest_at;
  const int e = largest < 0x1p-20f ? 0 : ValueScaleGrid::Ceil(largest, kValueTolerance);
  PutScale(row, uint32_t(e));
  if (e == 0) return;
  const bool bytes = layout.number == SPARKV_INT8;
  const int half = bytes ? 128 : 8;
  const float inverse = (float(half) - 0.5f) / ValueScaleGrid::Value(e);
  uint8_t* code = row + layout.scale_bytes;
  alignas(64) uint8_t codes[kMaxHeadDim];
  for (int j = 0; j < n; ++j) {
    // floor(x / step) for either sign, without a library call; |x / step| < 129.
    const int level = int(x[j] * inverse + 256.0f) - 256 + half;
    codes[j] = uint8_t(level < 0 ? 0 : level > 2 * half - 1 ? 2 * half - 1 : level);
  }
  codes[largest_at] = uint8_t(x[largest_at] < 0.0f ? 0 : 2 * half - 1);
  if (bytes) {
    std::memcpy(code, codes, size_t(n));
  } else {
    for (int j = 0; j < n / 2; ++j) code[j] = uint8_t(codes[2 * j] | codes[2 * j + 1] << 4);
  }
  *fragile = largest < 0x1p-6f || largest > 4096.0f;
}

// Packs what a fragile row unpacks to until the bytes stay the same.
inline bool SettleValue(const ValueLayout& layout, uint8_t* row) {
  uint16_t unpacked[kMaxHeadDim];
  const uint16_t* v = unpacked;
  uint8_t again[2 * kMaxHeadDim + 2];
  uint8_t* to = again;
  for (int round = 0; round < kSettle; ++round) {
    UnpackValue(layout, row, unpacked);
    bool fragile = false;
    if (layout.trellis()) {
      PackTrellisValuesOnce(layout, 1, &v, &to);
    } else {
      PackValueOnce(layout, v, again, &fragile);
    }
    if (std::memcmp(row, again, layout.bytes) == 0) return true;
    std::memcpy(row, again, layout.bytes);
  }
  return false;
}

void PackValues(const ValueLayout& layout, int n_rows, const uint16_t* const* v,
                uint8_t* const* rows) {
  if (!layout.trellis()) {
    for (int r = 0; r < n_rows; ++r) {
      bool fragile = false;
      PackValueOnce(layout, v[r], rows[r], &fragile);
      if (fragile) SettleValue(layout, rows[r]);
    }
    return;
  }
  for (int r = 0; r < n_rows; r += kRowLanes) {
    const int n = std::min(kRowLanes, n_rows - r);
    for (unsigned left = PackTrellisValuesOnce(layout, n, v + r, rows + r); left != 0;
         left &= left - 1) {
      uint8_t* row = rows[r + std::countr_zero(left)];
      if (SettleValue(layout, row)) continue;
      // f16 cannot hold it: zero, which is exact.
      const uint16_t zero[kMaxHeadDim] = {};
      const uint16_t* z = zero;
      PackTrellisValuesOnce(layout, 1, &z, &row);
    }
  }
}

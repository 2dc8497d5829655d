// Packing and exact unpacking of rows. Compiled once per instruction set without contraction of floating-point expressions:
// every sum has a fixed order, so all of them write the same bytes. Included inside a namespace per instruction set.
//
// Idempotence: Pack(RoundToHalf(Unpack(row))) == row under the same table. It rests on (1) scales on logarithmic grids with a
// tolerance wider than the rounding of f16, (2) the largest magnitude always taking the top code, (3) every kept magnitude
// staying above the pruned one, so that the same channels are selected again.

constexpr int kLanes16 = 16;
constexpr float kHalfNoise = 0x1p-9f;       // wider than the relative rounding error of f16 (2^-11) and of z
constexpr float kKeyTolerance = 0x1p-8f;
constexpr float kValueTolerance = 0x1p-9f;
constexpr int kSettle = 64;                 // rounds of pack and unpack for rows near the ends of f16's range

inline void PutCode(const KeyLayout& layout, uint8_t* row, int rank, int code) {
  uint8_t* low = row + layout.low_at;
  uint8_t* high = row + layout.high_at;
  switch (layout.number) {
    case SPARKV_INT8: low[rank] = uint8_t(code); break;
    case SPARKV_INT6: high[rank / 4] = uint8_t(high[rank / 4] | (code >> 4) << (rank % 4 * 2)); [[fallthrough]];
    case SPARKV_INT4: low[rank / 2] = uint8_t(low[rank / 2] | (code & 15) << (rank % 2 * 4)); break;
    case SPARKV_INT5:
      high[rank / 8] = uint8_t(high[rank / 8] | (code >> 4) << (rank % 8));
      low[rank / 2] = uint8_t(low[rank / 2] | (code & 15) << (rank % 2 * 4));
      break;
    case SPARKV_F16: break;
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

void UnpackKey(const KeyLayout& layout, const float* table, const uint8_t* row, uint16_t* k) {
  const float magnitude = PrunedMagnitude(layout, row);
  const bool integers = layout.number != SPARKV_F16;
  const float step = integers ? KeptStep(layout, row) : 0.0f;
  const float centre = integers ? float(1 << (NumberBits(layout.number) - 1)) - 0.5f : 0.0f;
  int rank = 0, pruned_rank = 0;
  for (int j = 0; j < layout.head_dim; ++j) {
    if (MaskBit(layout, row, j)) {
      if (integers) {
        k[j] = Saturate((float(GetCode(layout, row, rank)) - centre) * step * table[j]);
      } else {
        std::memcpy(&k[j], row + layout.low_at + 2 * size_t(rank), 2);
      }
      ++rank;
    } else {
      float x = 0.0f;
      if (layout.sign_bytes != 0) {
        const bool positive = row[layout.sign_at + unsigned(pruned_rank) / 8] >> (pruned_rank % 8) & 1;
        x = magnitude * table[j];
        if (!positive) x = -x;
        if (x == 0.0f) x = 0.0f;
      }
      ++pruned_rank;
      k[j] = Saturate(x);
      if (k[j] == 0x8000u) k[j] = 0;
    }
  }
}

// One pass; *fragile is set when f16 rounding of the unpacked row may exceed what the grids tolerate.
inline void PackKeyOnce(const KeyLayout& layout, const float* table, const float* weight, const uint16_t* k, uint8_t* row,
                        bool* fragile) {
  const int n = layout.head_dim;
  std::memset(row, 0, layout.bytes);
  if (!layout.needs_table()) {
    std::memcpy(row + layout.low_at, k, 2 * size_t(n));
    return;
  }
  alignas(64) float z[kMaxHeadDim];
  alignas(64) float score[kMaxHeadDim];
  uint64_t mask[kMaxHeadDim / 64] = {};
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    const float x = HalfToFloat(k[j]);
    z[j] = x * weight[j];
    finite &= (k[j] & 0x7c00u) != 0x7c00u;
  }
  // A channel without weight keeps NaN out of the products above only if its key is finite.
  for (int j = 0; j < n; ++j) score[j] = std::fabs(z[j]);
  if (!finite) {
    for (int j = 0; j < n; ++j) {
      if ((k[j] & 0x7c00u) == 0x7c00u) score[j] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  SelectTop(score, n, layout.kept, mask);
  const auto kept = [&](int j) { return (mask[j / 64] >> (j % 64) & 1) != 0; };
  if (layout.mask_bytes != 0) std::memcpy(row + layout.mask_at, mask, layout.mask_bytes);

  float largest = 0.0f, threshold = std::numeric_limits<float>::infinity();
  int largest_at = -1;
  for (int j = 0; j < n; ++j) {
    if (!kept(j)) continue;
    if (score[j] > largest) {
      largest = score[j];
      largest_at = j;
    }
    if (score[j] < threshold) threshold = score[j];
  }

  // c = mean of the pruned z^2 (reference) or |z| (paper) strictly below the threshold; dead channels do not count.
  float magnitude = 0.0f;
  if (layout.restores()) {
    const bool square = layout.recover == SPARKV_RECOVER_MEAN;
    float sum[kLanes16] = {}, count[kLanes16] = {};
    for (int j0 = 0; j0 < n; j0 += kLanes16) {
      for (int lane = 0; lane < kLanes16; ++lane) {
        const int j = j0 + lane;
        if (j >= n) break;
        const bool counts = !kept(j) && score[j] < threshold && weight[j] > 0.0f;
        const float x = square ? score[j] * score[j] : score[j];
        sum[lane] += counts ? x : 0.0f;
        count[lane] += counts ? 1.0f : 0.0f;
      }
    }
    for (int step = kLanes16 / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) {
        sum[lane] += sum[lane + step];
        count[lane] += count[lane + step];
      }
    }
    magnitude = count[0] > 0.0f ? sum[0] / count[0] : 0.0f;
    if (square) magnitude = std::sqrt(magnitude);
    if (!std::isfinite(magnitude)) magnitude = 0.0f;
  }

  if (layout.number == SPARKV_F16) {
    int rank = 0;
    for (int j = 0; j < n; ++j) {
      if (kept(j)) std::memcpy(row + layout.low_at + 2 * size_t(rank++), &k[j], 2);
    }
    if (layout.restores()) {
      int e = MeanGrid::Nearest(magnitude);
      while (e > 0 && MeanGrid::Value(e) >= threshold * (1.0f - kHalfNoise)) --e;
      row[0] = uint8_t(e);
    }
  } else if (layout.kept == 0) {
    PutScale(row, uint32_t(KeyScaleGrid::Nearest(magnitude)));
  } else if (!finite) {
    // NaN stays in its own token: kept channels unpack to NaN, pruned ones to zero.
    PutScale(row, uint32_t(kKeyScaleNotFinite | kRatioZero << 10));
    return;
  } else {
    const int e = KeyScaleGrid::Ceil(largest, kKeyTolerance);
    const float top = KeyScaleGrid::Value(e);
    int ratio = kRatioZero;
    if (magnitude > 0.0f && e > 0) {
      ratio = 1;
      while (ratio < kRatioZero && top * RatioValue(ratio) * (top * RatioValue(ratio + 1)) > magnitude * magnitude) ++ratio;
      while (ratio < kRatioZero && top * RatioValue(ratio) >= threshold * (1.0f - kHalfNoise)) ++ratio;
    }
    PutScale(row, uint32_t(e | ratio << 10));
    if (e > 0) {
      const int half = 1 << (NumberBits(layout.number) - 1);
      const float step = top / (float(half) - 0.5f);
      const float inverse = 1.0f / step;
      const float floor_magnitude = top * RatioValue(ratio) * (1.0f + kKeyTolerance);
      int rank = 0;
      for (int j = 0; j < n; ++j) {
        if (!kept(j)) continue;
        int level = int(score[j] * inverse);
        if (level > half - 1 || j == largest_at) level = half - 1;
        while (level < half - 1 && (float(level) + 0.5f) * step <= floor_magnitude) ++level;
        PutCode(layout, row, rank++, z[j] < 0.0f ? half - 1 - level : half + level);
      }
    }
  }
  if (layout.sign_bytes != 0) {
    // A channel that unpacks to zero has no sign: its bit is 0.
    const float restored = PrunedMagnitude(layout, row);
    int rank = 0;
    for (int j = 0; j < n; ++j) {
      if (kept(j)) continue;
      const float x = restored * table[j];
      const bool nonzero = x >= 0x1p-25f;
      if (nonzero && HalfToFloat(k[j]) > 0.0f) {
        row[layout.sign_at + unsigned(rank) / 8] |= uint8_t(1u << (rank % 8));
      }
      if (x < 0x1p-13f || x > 65000.0f) *fragile = true;
      ++rank;
    }
  }
  if (layout.number != SPARKV_F16) {
    for (int j = 0; j < n; ++j) {
      const float x = largest * table[j];
      if (x < 0x1p-8f || x > 65000.0f) *fragile = true;
    }
  }
}

void PackKey(const KeyLayout& layout, const float* table, const float* weight, const uint16_t* k, uint8_t* row) {
  bool fragile = false;
  PackKeyOnce(layout, table, weight, k, row, &fragile);
  // Near the ends of f16's range its rounding is coarse: settle on bytes that pack to themselves.
  for (int round = 0; fragile && round < kSettle; ++round) {
    uint16_t unpacked[kMaxHeadDim];
    uint8_t again[2 * kMaxHeadDim + 128];
    UnpackKey(layout, table, row, unpacked);
    PackKeyOnce(layout, table, weight, unpacked, again, &fragile);
    if (std::memcmp(row, again, layout.bytes) == 0) return;
    std::memcpy(row, again, layout.bytes);
  }
}

void UnpackValue(const ValueLayout& layout, const uint8_t* row, uint16_t* v) {
  const int n = layout.head_dim;
  if (layout.number == SPARKV_F16) {
    std::memcpy(v, row, 2 * size_t(n));
    return;
  }
  alignas(64) float x[kMaxHeadDim];
  const int e = int(GetScale(row) & 4095);
  if (e == kValueScaleNotFinite) {
    for (int j = 0; j < n; ++j) v[j] = 0x7e00u;
    return;
  }
  const bool bytes = layout.number == SPARKV_INT8;
  const float centre = bytes ? 127.5f : 7.5f;
  const float step = ValueScaleGrid::Value(e) / centre;
  const uint8_t* code = row + layout.scale_bytes;
  for (int j = 0; j < n; ++j) x[j] = (float(bytes ? code[j] : code[j / 2] >> (j % 2 * 4) & 15) - centre) * step;
  Rotate(x, n, RotationBlock(n));
  for (int j = 0; j < n; ++j) {
    v[j] = Saturate(x[j]);
    if (v[j] == 0x8000u) v[j] = 0;
  }
}

inline void PackValueOnce(const ValueLayout& layout, const uint16_t* v, uint8_t* row, bool* fragile) {
  const int n = layout.head_dim;
  std::memset(row, 0, layout.bytes);
  if (layout.number == SPARKV_F16) {
    std::memcpy(row, v, 2 * size_t(n));
    return;
  }
  alignas(64) float x[kMaxHeadDim];
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    x[j] = HalfToFloat(v[j]);
    finite &= (v[j] & 0x7c00u) != 0x7c00u;
  }
  if (!finite) {
    PutScale(row, kValueScaleNotFinite);
    return;
  }
  Rotate(x, n, RotationBlock(n));
  float largest = 0.0f;
  int largest_at = 0;
  for (int j = 0; j < n; ++j) {
    if (std::fabs(x[j]) > largest) {
      largest = std::fabs(x[j]);
      largest_at = j;
    }
  }
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

void PackValue(const ValueLayout& layout, const uint16_t* v, uint8_t* row) {
  bool fragile = false;
  PackValueOnce(layout, v, row, &fragile);
  for (int round = 0; fragile && round < kSettle; ++round) {
    uint16_t unpacked[kMaxHeadDim];
    uint8_t again[2 * kMaxHeadDim + 2];
    UnpackValue(layout, row, unpacked);
    PackValueOnce(layout, unpacked, again, &fragile);
    if (std::memcmp(row, again, layout.bytes) == 0) return;
    std::memcpy(row, again, layout.bytes);
  }
}

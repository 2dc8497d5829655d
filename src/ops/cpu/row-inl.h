// Reading the fields of a packed row, plainly. Included inside a namespace per instruction set.

inline uint64_t Word(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

inline int GetCode(const KeyLayout& layout, const uint8_t* row, int rank) {
  const uint8_t* low = row + layout.low_at;
  const uint8_t* high = row + layout.high_at;
  const int nibble = layout.number == SPARKV_INT8 ? 0 : low[rank / 2] >> (rank % 2 * 4) & 15;
  switch (layout.number) {
    case SPARKV_INT8:
      return low[rank];
    case SPARKV_INT6:
      return nibble | (high[rank / 4] >> (rank % 4 * 2) & 3) << 4;
    case SPARKV_INT5:
      return nibble | (high[rank / 8] >> (rank % 8) & 1) << 4;
    default:
      return nibble;
  }
}

inline bool MaskBit(const KeyLayout& layout, const uint8_t* row, int j) {
  if (layout.mask_bytes == 0) return layout.kept > 0;
  return row[layout.mask_at + unsigned(j) / 8] >> (j % 8) & 1;
}

inline uint32_t GetScale(const uint8_t* row) { return uint32_t(row[0] | row[1] << 8); }
// Largest kept |k|, NaN where the row is not finite.
inline float LargestKept(const uint8_t* row) {
  const int e = KeyScaleOf(GetScale(row));
  return e == kKeyScaleNotFinite ? std::numeric_limits<float>::quiet_NaN() : KeyScaleGrid::Value(e);
}

// Magnitude shared by the pruned channels, in units of |k| * weight.
inline float PrunedMagnitude(const KeyLayout& layout, const uint8_t* row) {
  if (!layout.restores()) return 0.0f;
  if (layout.number == SPARKV_F16) return MeanGrid::Value(row[0]);
  const uint32_t scale = GetScale(row);
  return KeyScaleOf(scale) == kKeyScaleNotFinite
             ? 0.0f
             : KeyScaleGrid::Value(KeyScaleOf(scale)) * RatioValue(RatioOf(scale));
}

constexpr Levels kLevels8{SPARKV_INT8}, kLevels6{SPARKV_INT6}, kLevels5{SPARKV_INT5},
    kLevels4{SPARKV_INT4};
inline const Levels& LevelsOf(sparkv_number number) {
  switch (number) {
    case SPARKV_INT8:
      return kLevels8;
    case SPARKV_INT6:
      return kLevels6;
    case SPARKV_INT5:
      return kLevels5;
    default:
      return kLevels4;
  }
}

// Calls body(constant) with an integer type as a compile-time constant.
template <typename Body>
inline void WithInteger(sparkv_number number, Body&& body) {
  switch (number) {
    case SPARKV_INT8:
      return body(std::integral_constant<sparkv_number, SPARKV_INT8>());
    case SPARKV_INT6:
      return body(std::integral_constant<sparkv_number, SPARKV_INT6>());
    case SPARKV_INT5:
      return body(std::integral_constant<sparkv_number, SPARKV_INT5>());
    default:
      return body(std::integral_constant<sparkv_number, SPARKV_INT4>());
  }
}

// Trellis-coded rows, plainly: reading their levels, and finding them (Viterbi). Included inside a
// namespace per instruction set, after row-inl.h.

// Runs of numbers that share bits and gain: the tiers of a key, or a value as a whole.
struct TrellisRuns {
  const PlaneLayout* planes;
  int n_runs, per_run;
  int bits[kTiers];
  int n() const { return n_runs * per_run; }
};
inline TrellisRuns RunsOf(const KeyLayout& layout) {
  TrellisRuns runs{&layout.planes, kTiers, layout.per_tier(), {}};
  std::copy(layout.tier_bits, layout.tier_bits + kTiers, runs.bits);
  return runs;
}
inline TrellisRuns RunsOf(const ValueLayout& layout) {
  return {&layout.planes, 1, layout.head_dim, {TrellisBits(layout.number)}};
}

inline int TierGain(const uint8_t* row, int tier) {
  const uint32_t word = uint32_t(row[0]) | uint32_t(row[1]) << 8 | uint32_t(row[2]) << 16;
  return int(word >> (6 * tier) & 63);
}
// What level 1 stands for in each tier, NaN where the row is not finite.
inline void TierUnits(const KeyLayout& layout, const uint8_t* row, float unit[kTiers]) {
  for (int t = 0; t < kTiers; ++t) {
    const int e = TierGain(row, t);
    unit[t] = e == kTierGainNotFinite
                  ? std::numeric_limits<float>::quiet_NaN()
                  : TierGainGrid::Value(e) * kTrellisLevels[layout.tier_bits[t]].inverse_top;
  }
}

// Planes of the code that follow from the path: bits 0 and 1 of 64 codes. before: the path of the
// 64 numbers before them, 0 at the start.
struct PathPlanes {
  uint64_t c0, c1;
  PathPlanes(uint64_t path, uint64_t before)
      : c0(path << 1 | before >> 63), c1(path ^ (path << 2 | before >> 62)) {}
};

// The level of a code in floating point, exactly: with y = code - (h - 0.5), x = |y| / (h - 0.5),
//   level = sign(y) floor(top x (0.45 + 0.55 x) + 0.5) = sign(y) floor(|y| (linear + square |y|) +
//   0.5)
struct LevelFormula {
  float centre, linear, square;
  constexpr LevelFormula(int bits)
      : centre(float(1 << bits) - 0.5f),
        linear(0.45f * float(TrellisTop(bits)) / centre),
        square(0.55f * float(TrellisTop(bits)) / centre / centre) {}
};

constexpr LevelFormula kLevelFormulas[kMaxTrellisBits + 1] = {0, 1, 2, 3, 4, 5, 6, 7};

// Calls body(constant) with the number of planes at compile time.
template <int kMost = kMaxPlanes, typename Body>
inline void WithPlanes(int n, Body&& body) {
  if constexpr (kMost == 1) {
    body(std::integral_constant<int, 1>());
  } else {
    if (n >= kMost) return body(std::integral_constant<int, kMost>());
    WithPlanes<kMost - 1>(n, body);
  }
}

// Bit i of a byte becomes byte i: 0 or 1.
inline uint64_t SpreadBits(unsigned byte) {
  const uint64_t ones = 0x0101010101010101u;
  const uint64_t bits = byte * ones & 0x8040201008040201u;  // byte i holds bit i, or nothing
  return (bits + 0x7f * ones) >> 7 & ones;
}

// numbers[i] = level of code i * unit of its run; in runs without bits, which come last, 0 * unit.
inline void TrellisNumbers(const TrellisRuns& runs, const uint8_t* row, const float* unit,
                           float* numbers) {
  const PlaneLayout& planes = *runs.planes;
  const int n = planes.numbers[0];
  for (int i = n; i < runs.n(); ++i) numbers[i] = 0.0f * unit[i / runs.per_run];
  unsigned before = 0;  // path bits of the two numbers before, the newer one in bit 1
  for (int first = 0; first < n; first += 8) {
    const unsigned path = row[planes.at[0] + unsigned(first) / 8];
    uint64_t codes = SpreadBits((path << 1 | before >> 1) & 255) +
                     2 * SpreadBits((path ^ (path << 2 | before)) & 255);
    before = path >> 6;
    for (int p = 1; p < planes.n_planes && planes.numbers[p] > first; ++p) {
      const int left = planes.numbers[p] - first;
      const unsigned plane = row[planes.at[p] + unsigned(first) / 8];
      codes += SpreadBits(left >= 8 ? plane : plane & ((1u << left) - 1)) << (p + 1);
    }
    for (int i = first; i < first + 8 && i < n; ++i, codes >>= 8) {
      const int run = i / runs.per_run;
      numbers[i] = float(kTrellisLevels[runs.bits[run]].level[codes & 255]) * unit[run];
    }
  }
}

// A tiered key: weighted, tier by tier, each rotated, as the prepared queries are. numbers: what
// TrellisNumbers does, or faster.
template <typename Numbers>
inline void TierRow(const KeyLayout& layout, const uint8_t* row, float* out, Numbers&& numbers) {
  float unit[kTiers];
  TierUnits(layout, row, unit);
  numbers(RunsOf(layout), row, unit, out);
}

// False when the value is not finite.
template <typename Numbers>
inline bool TrellisValue(const ValueLayout& layout, const uint8_t* row, float* out,
                         Numbers&& numbers) {
  if (row[0] == kValueGainNotFinite) return false;
  const float unit =
      ValueGainGrid::Value(row[0]) * kTrellisLevels[TrellisBits(layout.number)].inverse_top;
  numbers(RunsOf(layout), row, &unit, out);
  return true;
}

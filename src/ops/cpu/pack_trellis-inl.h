// Packing with a trellis. Included inside pack-inl.h, whose rules hold here as well: the same bytes
// on every instruction set, and Pack(RoundToHalf(Unpack(row))) == row. The second rests on levels
// being whole numbers: numbers that were coded before are recognised, gain and all.

// A row that was unpacked lies on levels but for f16's rounding: this close to them, in their
// units.
constexpr float OnLevel(int bits) { return bits >= 6 ? 0.45f : 0.1f; }
constexpr int kGainSteps = 13;  // of a quarter octave that the outermost level used may lie inside

// The gain under which all of x lies on levels, 0: none.
template <typename Grid>
inline int GainOfLevels(const float* x, int n, int bits) {
  float largest = 0.0f;
  for (int i = 0; i < n; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  const int first = Grid::Ceil(largest, 0x1p-10f);
  if (first == 0) return 0;
  const TrellisLevels& levels = kTrellisLevels[bits];
  for (int e = first; e < first + kGainSteps && e <= Grid::kMost; ++e) {
    const float per_unit = levels.top / Grid::Value(e);
    int i = 0;
    for (; i < n; ++i) {
      const float at = x[i] * per_unit;
      if (!(std::fabs(at) < 1023.5f)) break;
      const int level = int(at + 1024.5f) + levels.kLowest;
      const int below = levels.below[level - levels.kLowest];
      if (std::fabs(at - float(level)) > OnLevel(bits) || below == 0 ||
          levels.level[below - 1] != level)
        break;
    }
    if (i == n) return e;
  }
  return 0;
}

inline float SumOfSquares(const float* x, int n) {
  float sum[kLanes16] = {};
  for (int i = 0; i < n; ++i) sum[i % kLanes16] += x[i] * x[i];
  for (int half = kLanes16 / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  }
  return sum[0];
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// Lane i of the result: lane from[i] of v.
template <typename V>
inline V Shuffled(V v, FourInts from) {
#if defined(__clang__)  // has no shuffle by a variable
  V result;
  for (int i = 0; i < 4; ++i) result[i] = v[from[i]];
  return result;
#else
  return __builtin_shuffle(v, from);
#endif
}

// Codes of x and the gain of each run; planes of the row were zero. The path that loses least under
// the gain that suits a normal distribution; then the gain that gives the run its length back: a
// score that is too small is worse than one that is noisy (docs/results.md).
// Of equal paths the one with p[i-2] = 0 wins, at its end the smaller state.
template <typename Grid>
inline void PackTrellis(const TrellisRuns& runs, const float* x, uint8_t* row, int* gain,
                        bool* fragile) {
  // By subset c of levels: the code to take and its level; by state: whether p[i-2] is 1.
  alignas(16) int32_t pick[kMaxHeadDim][4], back[kMaxHeadDim][4];
  alignas(16) float level[kMaxHeadDim][4];
  Four cost = {0.0f, 1e30f, 1e30f, 1e30f};  // of state p[i-1] | p[i-2] << 1
  bool found[kTiers];
  for (int run = 0, i = 0; run < runs.n_runs; ++run) {
    const int bits = runs.bits[run];
    const TrellisLevels& levels = kTrellisLevels[bits];
    const float* from = x + run * runs.per_run;
    gain[run] = GainOfLevels<Grid>(from, runs.per_run, bits);
    found[run] = gain[run] > 0;
    if (!found[run]) {
      const float square = SumOfSquares(from, runs.per_run) / float(runs.per_run);
      gain[run] = Grid::Nearest(std::sqrt(square) * levels.best_top);
    }
    const float top = Grid::Value(gain[run]);
    const float unit = top / levels.top, per_unit = gain[run] > 0 ? levels.top / top : 0.0f;
    for (const int end = i + runs.per_run; i < end; ++i) {
      float at = x[i] * per_unit;
      at = at > levels.top ? levels.top : at < -levels.top - 1.0f ? -levels.top - 1.0f : at;
      const int below = levels.below[int(at - float(levels.kLowest))];
      // The four levels at or below x and the four above it: two of each subset, the subset of lane
      // k is (below + k) mod 4.
      const float* near = levels.near + levels.kBeyond + below - 4;
      Four low, high;
      std::memcpy(&low, near, sizeof(low));
      std::memcpy(&high, near + 4, sizeof(high));
      const Four to_low = at - low, to_high = high - at;
      const FourInts lower = to_low <= to_high;
      const Four off = (lower ? to_low : to_high) * unit;
      // Lane c of the result: subset c.
      const FourInts turn = (FourInts{0, 1, 2, 3} - below) & 3;
      const Four best = Shuffled(off * off, turn);
      const FourInts first = FourInts{0, 1, 2, 3} + below - 4;
      const FourInts code = Shuffled(lower ? first : first + 4, turn);
      const Four at_level = Shuffled(lower ? low : high, turn);
      std::memcpy(pick[i], &code, sizeof(code));
      std::memcpy(level[i], &at_level, sizeof(at_level));
      // State u | v << 1, u = p[i], v = p[i-1], is reached from p[i-2] = 0 with subset u << 1 | v,
      // and from 1 with subset (u ^ 1) << 1 | v.
      const Four zero = Shuffled(cost, FourInts{0, 0, 1, 1}) + Shuffled(best, FourInts{0, 2, 1, 3});
      const Four one = Shuffled(cost, FourInts{2, 2, 3, 3}) + Shuffled(best, FourInts{2, 0, 3, 1});
      const FourInts chosen = one < zero;
      cost = chosen ? one : zero;
      std::memcpy(back[i], &chosen, sizeof(chosen));
    }
  }
  int state = 0;
  for (int s = 1; s < 4; ++s) state = cost[s] < cost[state] ? s : state;
  float levels_of[kMaxHeadDim];
  alignas(8) uint8_t bits_of[kMaxHeadDim + 8] = {};
  for (int i = runs.n() - 1; i >= 0; --i) {
    const int u = state & 1, v = state >> 1, w = back[i][state] & 1;
    const int c = (u ^ w) << 1 | v;
    bits_of[i] = uint8_t(pick[i][c] >> 2 << 1 | u);
    levels_of[i] = level[i][c];
    state = v | w << 1;
  }
  for (int p = 0; p < runs.planes->n_planes; ++p) {
    // Bit p of eight bytes, gathered by a product that has no carries.
    for (int i = 0; i < runs.planes->numbers[p]; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, bits_of + i, 8);
      const int left = runs.planes->numbers[p] - i;
      const uint64_t plane = (eight >> p & 0x0101010101010101u) * 0x0102040810204080u >> 56;
      row[runs.planes->at[p] + unsigned(i) / 8] |=
          uint8_t(left >= 8 ? plane : plane & ((1u << left) - 1));
    }
  }
  for (int run = 0; run < runs.n_runs; ++run) {
    float* levels = levels_of + run * runs.per_run;
    if (gain[run] == 0) continue;
    if (!found[run]) {
      const float length = SumOfSquares(x + run * runs.per_run, runs.per_run);
      const float coded = SumOfSquares(levels, runs.per_run);
      const int e = Grid::Nearest(kTrellisLevels[runs.bits[run]].top * std::sqrt(length / coded));
      gain[run] = e < 1 ? 1 : e;
    }
    const float unit = Grid::Value(gain[run]) / kTrellisLevels[runs.bits[run]].top;
    for (int i = 0; i < runs.per_run; ++i) levels[i] *= unit;
    if (GainOfLevels<Grid>(levels, runs.per_run, runs.bits[run]) != gain[run]) *fragile = true;
  }
}

// A tiered key as its tiers see it: weighted, tier by tier, each rotated.
inline int TierBlock(const KeyLayout& layout) { return RotationBlock(layout.per_tier()); }

void UnpackTiers(const KeyLayout& layout, const float* table, const uint8_t* row, uint16_t* k) {
  const KeyWeights w(table, layout.head_dim);
  alignas(64) float x[kMaxHeadDim];
  float unit[kTiers];
  TierUnits(layout, row, unit);
  TrellisNumbers(RunsOf(layout), row, unit, x);
  Rotate(x, layout.head_dim, TierBlock(layout));
  for (int i = 0; i < layout.head_dim; ++i) {
    const int j = int(w.order[i]);
    k[j] = Saturate(x[i] * w.restore[j]);
    if (k[j] == 0x8000u) k[j] = 0;
  }
}

inline void PackTiersOnce(const KeyLayout& layout, const float* table, const uint16_t* k,
                          uint8_t* row, bool* fragile) {
  const int n = layout.head_dim;
  const KeyWeights w(table, n);
  std::memset(row, 0, layout.bytes);
  alignas(64) float x[kMaxHeadDim];
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    const int j = int(w.order[i]);
    x[i] = HalfToFloat(k[j]) * w.weight[j];
    finite &= (k[j] & 0x7c00u) != 0x7c00u;
  }
  int gain[kTiers] = {kTierGainNotFinite, kTierGainNotFinite, kTierGainNotFinite,
                      kTierGainNotFinite};
  if (finite) {
    Rotate(x, n, TierBlock(layout));
    PackTrellis<TierGainGrid>(RunsOf(layout), x, row, gain, fragile);
  }
  const uint32_t word = uint32_t(gain[0] | gain[1] << 6 | gain[2] << 12 | gain[3] << 18);
  for (int i = 0; i < 3; ++i) row[i] = uint8_t(word >> (8 * i));
  // Fragile: near the ends of its range f16 rounds coarsely.
  for (int i = 0; i < n && finite; ++i) {
    const int j = int(w.order[i]);
    const int tier = i / layout.per_tier();
    const float unit =
        TierGainGrid::Value(gain[tier]) / kTrellisLevels[TierBits(layout.number, tier)].top;
    if (unit > 0.0f && (w.weight[j] * 0x1p-25f > 0.01f * unit || w.restore[j] * unit > 20.0f))
      *fragile = true;
  }
}

void PackTiers(const KeyLayout& layout, const float* table, const uint16_t* k, uint8_t* row) {
  bool fragile = false;
  PackTiersOnce(layout, table, k, row, &fragile);
  if (!fragile) return;
  uint16_t unpacked[kMaxHeadDim];
  uint8_t again[2 * kMaxHeadDim];
  for (int round = 0; round < kSettle; ++round) {
    UnpackTiers(layout, table, row, unpacked);
    PackTiersOnce(layout, table, unpacked, again, &fragile);
    if (std::memcmp(row, again, layout.bytes) == 0) return;
    std::memcpy(row, again, layout.bytes);
  }
  // f16 cannot hold it: zero, which is exact.
  std::memset(unpacked, 0, sizeof(unpacked));
  PackTiersOnce(layout, table, unpacked, row, &fragile);
}

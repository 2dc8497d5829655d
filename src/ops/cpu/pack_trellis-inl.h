// Packing with a trellis. Included inside pack-inl.h, whose rules hold here as well: the same bytes
// on every instruction set, and Pack(RoundToHalf(Unpack(row))) == row. The second rests on levels
// being whole numbers: numbers that were coded before are recognised, gain and all.

// Rows are packed side by side, one per lane of a vector: a path is a long chain of small steps,
// and rows do not wait for each other. Every lane does what a row alone would do, in the same
// order, so bytes do not depend on the width.
#if defined(__AVX512F__)
constexpr int kRowLanes = 16;
#elif defined(__AVX2__)
constexpr int kRowLanes = 8;
#else
constexpr int kRowLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kRowLanes), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(4 * kRowLanes), may_alias));

inline bool Any(IntLanes mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__m512i(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(__m256i(mask)) != 0;
#else
  int32_t any = 0;
  for (int r = 0; r < kRowLanes; ++r) any |= mask[r];
  return any != 0;
#endif
}
inline Lanes Floats(IntLanes x) { return __builtin_convertvector(x, Lanes); }
inline IntLanes Truncated(Lanes x) { return __builtin_convertvector(x, IntLanes); }
inline Lanes Magnitude(Lanes x) { return x < 0.0f ? -x : x; }

constexpr bool LevelFormulasAreExact() {
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    const LevelFormula f(bits);
    for (int code = 0; code < 2 << bits; ++code) {
      const float y = float(code) - f.centre, size = y < 0.0f ? -y : y;
      const int level = int(size * (f.linear + f.square * size) + 0.5f);
      if ((y < 0.0f ? -level : level) != kTrellisLevels[bits].level[code]) return false;
    }
  }
  return true;
}
static_assert(LevelFormulasAreExact());

// Levels of codes; of codes that there are not, some number.
template <int kBits>
inline Lanes LevelOf(IntLanes code) {
#if defined(__AVX512F__)
  if constexpr (kBits <= 4) {
    struct Table {
      alignas(64) float level[32] = {};
      constexpr Table() {
        for (int c = 0; c < 2 << kBits; ++c) level[c] = float(kTrellisLevels[kBits].level[c]);
      }
    };
    static constexpr Table kTable;
    const __m512 low = _mm512_load_ps(kTable.level);
    if constexpr (kBits <= 3) return Lanes(_mm512_permutexvar_ps(__m512i(code), low));
    return Lanes(_mm512_permutex2var_ps(low, __m512i(code), _mm512_load_ps(kTable.level + 16)));
  }
#endif
  constexpr LevelFormula kFormula(kBits);
  const Lanes y = Floats(code) - kFormula.centre, size = Magnitude(y);
  const Lanes level = Floats(Truncated(size * (kFormula.linear + kFormula.square * size) + 0.5f));
  return y < 0.0f ? -level : level;
}

// How many levels are at most x.
template <int kBits>
inline IntLanes LevelsUpTo(Lanes x) {
  IntLanes n = {};
  for (int step = 1 << kBits; step > 0; step /= 2) {
    const IntLanes further = n + step;
    n = LevelOf<kBits>(further - 1) <= x ? further : n;
  }
  return n - (LevelOf<kBits>(n) <= x);
}

// A row that was unpacked lies on levels but for f16's rounding: this close to them, in their
// units, which are small where bits are few or many.
constexpr float OnLevel(int bits) {
  return bits >= 6 || bits <= 2 ? 0.45f : bits == 3 ? 0.3f : 0.1f;
}
// How much further out than its gain, as a part of it, the outermost may lie.
constexpr float BeyondTop(int bits) {
  return std::max(0x1p-10f, OnLevel(bits) / float(TrellisTop(bits)));
}
constexpr int kGainSteps = 13;  // of a quarter octave that the outermost level used may lie inside

inline Lanes Largest(const Lanes* x, int n) {
  Lanes largest = {};
  for (int i = 0; i < n; ++i) largest = Magnitude(x[i]) > largest ? Magnitude(x[i]) : largest;
  return largest;
}

// The first gain below `end` under which all of x [n] lies on levels, 0: none.
template <int kBits, typename Grid>
inline IntLanes GainOfLevels(const Lanes* x, int n, Lanes largest, IntLanes end) {
  IntLanes first = {}, found = {};
  Lanes start[4] = {};  // values of the first four; four steps on they are twice that
  for (int r = 0; r < kRowLanes; ++r) {
    const int e = Grid::Ceil(largest[r], BeyondTop(kBits));
    first[r] = e;
    for (int k = 0; k < 4; ++k) start[k][r] = Grid::Value(e + k);
  }
  IntLanes open = first > 0;
  for (int k = 0; k < kGainSteps && Any(open); ++k) {
    const IntLanes e = first + k;
    IntLanes alive = open & (e <= Grid::kMost) & (e < end);
    const Lanes per_unit = kTrellisLevels[kBits].top / (start[k % 4] * float(1 << (k / 4)));
    for (int i = 0; i < n && Any(alive); ++i) {
      const Lanes at = x[i] * per_unit;
      alive &= Magnitude(at) < 1023.5f;
      const IntLanes level = Truncated((alive != 0 ? at : Lanes{}) + 1024.5f) - 1024;
      alive &= Magnitude(at - Floats(level)) <= OnLevel(kBits);
      if (!Any(alive)) break;
      const IntLanes below = LevelsUpTo<kBits>(Floats(level));
      alive &= (below != 0) & (LevelOf<kBits>(below - 1) == Floats(level));
    }
    found = alive != 0 ? e : found;
    open &= ~alive;
  }
  return found;
}

inline Lanes SumOfSquares(const Lanes* x, int n) {
  Lanes sum[kLanes16] = {};
  for (int i = 0; i < n; ++i) sum[i % kLanes16] += x[i] * x[i];
  for (int half = kLanes16 / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  }
  return sum[0];
}

// Rows side by side on their way to codes. x: [numbers], as rotated.
struct Paths {
  Lanes x[kMaxHeadDim];
  IntLanes codes[kMaxHeadDim];  // those to take from subset c, at bit 8 c; then the code taken
  IntLanes back[kMaxHeadDim];   // bit s: whether p[i-2] is 1 on the way to state s
  IntLanes gain[kTiers];
  IntLanes was_coded[kTiers];  // the gain is that of numbers that were coded before
  IntLanes fragile = {};
  Lanes cost[4] = {Lanes{}, Lanes{} + 1e30f, Lanes{} + 1e30f, Lanes{} + 1e30f};
};

// Gain and steps of one run, numbers begin .. end - 1; lifted: coded so that they keep their size.
template <int kBits, typename Grid>
inline void WalkRun(int run, int begin, int end, bool lifted, Paths* paths) {
  constexpr const TrellisLevels& kLevels = kTrellisLevels[kBits];
  constexpr int kCodes = 2 << kBits;
  const int n = end - begin;
  Lanes* x = paths->x + begin;
  Lanes largest = Largest(x, n);
  IntLanes gain = GainOfLevels<kBits, Grid>(x, n, largest, IntLanes{} + Grid::kMost + 1);
  paths->was_coded[run] = gain > 0;
  if (lifted) {
    const Lanes lift = gain > 0 ? Lanes{} + 1.0f : Lanes{} + kLevels.lift;
    for (int i = 0; i < n; ++i) x[i] *= lift;
    largest *= lift;
  }
  const Lanes square = SumOfSquares(x, n) / float(n);
  Lanes top;
  for (int r = 0; r < kRowLanes; ++r) {
    if (gain[r] == 0) {
      // Levels that no number reaches would be lost: few numbers have their largest well inside of
      // where many have it. One a little outside is worth it where levels are far apart.
      gain[r] = std::min(Grid::Nearest(std::sqrt(square[r]) * kLevels.best_top),
                         Grid::Ceil(largest[r], 1.0f / float(1 << kBits)));
    }
    top[r] = Grid::Value(gain[r]);
  }
  paths->gain[run] = gain;
  const Lanes unit = top / kLevels.top;
  const Lanes per_unit = gain > 0 ? kLevels.top / top : Lanes{};
  Lanes cost[4];
  for (int s = 0; s < 4; ++s) cost[s] = paths->cost[s];
  for (int i = begin; i < end; ++i) {
    Lanes at = paths->x[i] * per_unit;
    at = at > kLevels.top ? Lanes{} + kLevels.top : at;
    at = at < -kLevels.top - 1.0f ? Lanes{} - kLevels.top - 1.0f : at;
    const IntLanes below = LevelsUpTo<kBits>(at);
    Lanes best[4];
    IntLanes codes = {};
    for (int c = 0; c < 4; ++c) {
      // Of each subset the level at or below x and the one above it.
      const IntLanes low = below - 4 + ((c - below) & 3), high = low + 4;
      const Lanes to_low = at - (low >= 0 ? LevelOf<kBits>(low) : Lanes{} - 1e10f);
      const Lanes to_high = (high < kCodes ? LevelOf<kBits>(high) : Lanes{} + 1e10f) - at;
      const IntLanes lower = to_low <= to_high;
      const Lanes off = (lower ? to_low : to_high) * unit;
      best[c] = off * off;
      codes |= (lower ? low : high) << (8 * c);
    }
    paths->codes[i] = codes;
    // State u | v << 1, u = p[i], v = p[i-1], is reached from p[i-2] = 0 with subset u << 1 | v,
    // and from 1 with subset (u ^ 1) << 1 | v. Of equal paths the one with 0 wins.
    Lanes next[4];
    IntLanes back = {};
    for (int s = 0; s < 4; ++s) {
      const int u = s & 1, v = s >> 1;
      const Lanes zero = cost[v] + best[u << 1 | v], one = cost[v | 2] + best[(u ^ 1) << 1 | v];
      const IntLanes chosen = one < zero;
      next[s] = chosen ? one : zero;
      back |= chosen & 1 << s;
    }
    for (int s = 0; s < 4; ++s) cost[s] = next[s];
    paths->back[i] = back;
  }
  for (int s = 0; s < 4; ++s) paths->cost[s] = cost[s];
}

// The gain that gives a run its length back: a score that is too small is worse than one that is
// noisy (docs/results.md). codes: those taken.
template <int kBits, typename Grid>
inline void RefitRun(int run, int begin, int end, Paths* paths) {
  constexpr const TrellisLevels& kLevels = kTrellisLevels[kBits];
  const int n = end - begin;
  // The way back was gone: its place is free. Stacks of threads may be small.
  Lanes* levels = reinterpret_cast<Lanes*>(paths->back + begin);
  for (int i = 0; i < n; ++i) levels[i] = LevelOf<kBits>(paths->codes[begin + i]);
  const Lanes length = SumOfSquares(paths->x + begin, n), coded = SumOfSquares(levels, n);
  IntLanes& gain = paths->gain[run];
  Lanes unit;
  for (int r = 0; r < kRowLanes; ++r) {
    if (gain[r] != 0 && paths->was_coded[run][r] == 0)
      gain[r] = std::max(1, Grid::Nearest(kLevels.top * std::sqrt(length[r] / coded[r])));
    unit[r] = Grid::Value(gain[r]) / kLevels.top;
  }
  for (int i = 0; i < n; ++i) levels[i] *= unit;
  // Packed again it must find this gain: no smaller one may do, nor this one be out of its reach.
  const Lanes largest = Largest(levels, n);
  IntLanes far;
  for (int r = 0; r < kRowLanes; ++r) {
    const int first = Grid::Ceil(largest[r], BeyondTop(kBits));
    far[r] = -int(first == 0 || gain[r] >= first + kGainSteps);
  }
  paths->fragile |= (gain > 0) & (far | (GainOfLevels<kBits, Grid>(levels, n, largest, gain) != 0));
}

// Calls body(constant) with the bits of a run at compile time.
template <int kMost = kMaxTrellisBits, typename Body>
inline void WithBits(int bits, Body&& body) {
  if constexpr (kMost == 1) {
    body(std::integral_constant<int, 1>());
  } else {
    if (bits == kMost) return body(std::integral_constant<int, kMost>());
    WithBits<kMost - 1>(bits, body);
  }
}

// Codes of the rows' numbers x, their gains, and which rows are fragile; the planes of rows
// [n_rows] were zero. The path that loses least under a gain that suits a normal distribution and
// the largest number.
template <typename Grid>
inline void PackTrellis(const TrellisRuns& runs, int n_rows, uint8_t* const* rows, bool lifted,
                        Paths* paths) {
  const PlaneLayout& planes = *runs.planes;
  const int n = planes.numbers[0], n_runs = n / runs.per_run;
  for (int run = n_runs; run < runs.n_runs; ++run) paths->gain[run] = IntLanes{};  // without bits
  for (int run = 0; run < n_runs; ++run) {
    WithBits(runs.bits[run], [&](auto bits) {
      WalkRun<bits(), Grid>(run, run * runs.per_run, (run + 1) * runs.per_run, lifted, paths);
    });
  }
  // The smaller of equal states ends.
  IntLanes state = {};
  Lanes least = paths->cost[0];
  for (int s = 1; s < 4; ++s) {
    const IntLanes less = paths->cost[s] < least;
    state = less ? IntLanes{} + s : state;
    least = less ? paths->cost[s] : least;
  }
  IntLanes word[kMaxPlanes] = {};
  for (int i = n - 1; i >= 0; --i) {
    const IntLanes u = state & 1, v = state >> 1, w = paths->back[i] >> state & 1;
    const IntLanes code = paths->codes[i] >> (((u ^ w) << 1 | v) << 3) & 255;
    paths->codes[i] = code;
    const IntLanes bits = code >> 2 << 1 | u;
    state = v | w << 1;
    for (int p = 0; p < planes.n_planes && planes.numbers[p] > i; ++p) {
      word[p] |= (bits >> p & 1) << i % 32;
      if (i % 32 != 0) continue;
      const size_t at = planes.at[p] + size_t(i) / 8;
      const size_t left = std::min(4, (planes.numbers[p] - i + 7) / 8);
      for (int r = 0; r < n_rows; ++r) {
        const int32_t four = word[p][r];
        std::memcpy(rows[r] + at, &four, left);
      }
      word[p] = IntLanes{};
    }
  }
  for (int run = 0; run < n_runs; ++run) {
    WithBits(runs.bits[run], [&](auto bits) {
      RefitRun<bits(), Grid>(run, run * runs.per_run, (run + 1) * runs.per_run, paths);
    });
  }
}

inline void RotateLanes(Lanes* x, int n, int block) {
  for (int half = 1; half < block; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const Lanes s = x[j] + x[j + half], d = x[j] - x[j + half];
        x[j] = s;
        x[j + half] = d;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(float(block));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

// f16 -> f32; false when a number is not finite.
inline bool HalfFloats(const uint16_t* half, int n, float* out) {
  unsigned largest = 0;
  for (int j = 0; j < n; ++j) {
    out[j] = HalfToFloat(half[j]);
    largest = std::max(largest, unsigned(half[j] & 0x7fffu));
  }
  return largest < 0x7c00u;
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

// At most kRowLanes rows. Returns a bit per row that may not be packed to itself.
inline unsigned PackTiersOnce(const KeyLayout& layout, int n_rows, const float* const* tables,
                              const uint16_t* const* k, uint8_t* const* rows) {
  const int n = layout.head_dim, per_tier = layout.per_tier();
  Paths paths;
  unsigned not_finite = 0, fragile = 0;
  float most_weight[kTiers] = {}, most_restore[kTiers] = {};  // of the table before
  std::memset(paths.x, 0, size_t(n) * sizeof(Lanes));
  float limits[kRowLanes][kTiers][2];
  for (int r = 0; r < n_rows; ++r) {
    const KeyWeights w(tables[r], n);
    float numbers[kMaxHeadDim];
    std::memset(rows[r], 0, layout.bytes);
    if (!HalfFloats(k[r], n, numbers)) {
      not_finite |= 1u << r;
      std::memset(numbers, 0, sizeof(numbers));
    }
    for (int j = 0; j < n; ++j) numbers[j] *= w.weight[j];
    float* x = reinterpret_cast<float*>(paths.x) + r;
    for (int i = 0; i < n; ++i) x[i * kRowLanes] = numbers[int(w.order[i])];
    for (int t = 0; t < kTiers && (r == 0 || tables[r] != tables[r - 1]); ++t) {
      most_weight[t] = most_restore[t] = 0.0f;
      for (int i = t * per_tier; i < (t + 1) * per_tier; ++i) {
        most_weight[t] = std::max(most_weight[t], w.weight[int(w.order[i])]);
        most_restore[t] = std::max(most_restore[t], w.restore[int(w.order[i])]);
      }
    }
    for (int t = 0; t < kTiers; ++t) {
      limits[r][t][0] = most_weight[t];
      limits[r][t][1] = most_restore[t];
    }
  }
  RotateLanes(paths.x, n, TierBlock(layout));
  PackTrellis<TierGainGrid>(RunsOf(layout), n_rows, rows, false, &paths);
  for (int r = 0; r < n_rows; ++r) {
    const bool finite = (not_finite >> r & 1) == 0;
    uint32_t word = 0;
    for (int t = 0; t < kTiers; ++t) {
      const int gain = finite ? paths.gain[t][r] : kTierGainNotFinite;
      word |= uint32_t(gain) << (6 * t);
      // Near the ends of its range f16 rounds coarsely.
      const float unit = TierGainGrid::Value(gain) / kTrellisLevels[layout.tier_bits[t]].top;
      const bool coarse = unit > 0.0f && (limits[r][t][0] * 0x1p-25f > 0.01f * unit ||
                                          limits[r][t][1] * unit > 20.0f);
      if (finite && (coarse || paths.fragile[r] != 0)) fragile |= 1u << r;
    }
    if (!finite) std::memset(rows[r], 0, layout.bytes);
    for (int i = 0; i < 3; ++i) rows[r][i] = uint8_t(word >> (8 * i));
  }
  return fragile;
}

// Packs what a fragile row unpacks to until the bytes stay the same.
inline void SettleTiers(const KeyLayout& layout, const float* table, uint8_t* row) {
  uint16_t unpacked[kMaxHeadDim];
  const uint16_t* k = unpacked;
  uint8_t again[2 * kMaxHeadDim];
  uint8_t* to = again;
  for (int round = 0; round < kSettle; ++round) {
    UnpackTiers(layout, table, row, unpacked);
    PackTiersOnce(layout, 1, &table, &k, &to);
    if (std::memcmp(row, again, layout.bytes) == 0) return;
    std::memcpy(row, again, layout.bytes);
  }
  // f16 cannot hold it: zero, which is exact.
  std::memset(unpacked, 0, sizeof(unpacked));
  PackTiersOnce(layout, 1, &table, &k, &row);
}

inline void PackTiers(const KeyLayout& layout, int n_rows, const float* const* tables,
                      const uint16_t* const* k, uint8_t* const* rows) {
  for (int r = 0; r < n_rows; r += kRowLanes) {
    const int n = std::min(kRowLanes, n_rows - r);
    for (unsigned left = PackTiersOnce(layout, n, tables + r, k + r, rows + r); left != 0;
         left &= left - 1) {
      const int i = r + std::countr_zero(left);
      SettleTiers(layout, tables[i], rows[i]);
    }
  }
}

// At most kRowLanes rows of trellis-coded values. Returns a bit per fragile row.
inline unsigned PackTrellisValuesOnce(const ValueLayout& layout, int n_rows,
                                      const uint16_t* const* v, uint8_t* const* rows) {
  const int n = layout.head_dim;
  Paths paths;
  unsigned not_finite = 0, fragile = 0;
  std::memset(paths.x, 0, size_t(n) * sizeof(Lanes));
  for (int r = 0; r < n_rows; ++r) {
    float numbers[kMaxHeadDim];
    std::memset(rows[r], 0, layout.bytes);
    if (!HalfFloats(v[r], n, numbers)) {
      not_finite |= 1u << r;
      continue;
    }
    float* x = reinterpret_cast<float*>(paths.x) + r;
    for (int i = 0; i < n; ++i) x[i * kRowLanes] = numbers[i];
  }
  RotateLanes(paths.x, n, RotationBlock(n));
  // Attention takes means of values: what is random in their errors goes away, what all lack does
  // not.
  PackTrellis<ValueGainGrid>(RunsOf(layout), n_rows, rows, true, &paths);
  for (int r = 0; r < n_rows; ++r) {
    if ((not_finite >> r & 1) != 0) {
      std::memset(rows[r], 0, layout.bytes);
      rows[r][0] = kValueGainNotFinite;
      continue;
    }
    rows[r][0] = uint8_t(paths.gain[0][r]);
    const float top = ValueGainGrid::Value(paths.gain[0][r]);
    if (paths.fragile[r] != 0 || top < 0x1p-6f || top > 4096.0f) fragile |= 1u << r;
  }
  return fragile;
}

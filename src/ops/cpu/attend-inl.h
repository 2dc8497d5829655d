// Attention over one tile of 64 rows, for one token or a micro-batch alike. Included inside a
// namespace per instruction set, after it has defined
//   kVec           floats per vector; kColVecs vectors per column block (kVec * kColVecs divides
//   64) KeyRow(layout, table, row, out)     packed key row -> f32 [head_dim] ValueRow(layout, row,
//   out)          packed value row -> f32 [head_dim] in the rotated basis; false when not finite
//   HalfRow(half, n, out)               f16 -> f32; false when a value is not finite
//
// Stages per tile: (1) rows are unpacked once, to f32 in L1, for all query rows of the block; keys
// are transposed so that tokens lie in lanes; (2) scores = Q K^T, six query rows at a time; (3)
// online softmax; (4) o = o * e^(m_old - m) + P V. What unpacking costs is shared by all heads of
// the group and all tokens of the block; the rest is a plain matrix product.

typedef float Vec __attribute__((vector_size(4 * kVec)));
typedef int32_t IntVec __attribute__((vector_size(4 * kVec)));
typedef float VecU __attribute__((vector_size(4 * kVec), aligned(4), may_alias));

inline Vec Load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void Store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
inline Vec Set(float x) { return Vec{} + x; }

// Calls body(constant) for 0 .. kCount - 1. GCC unrolls a loop too late to keep an array of vectors
// that it walks in registers: each round would store them all.
template <int kCount, typename Body>
[[gnu::always_inline]] inline void Unroll(Body&& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>()), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

constexpr int kRows =
    6;  // query rows per matrix kernel: kRows * kColVecs accumulators stay in registers
static_assert(kRows <= kScoreRows);

// e^x for x <= 0, about 1 ulp; below -87 it gives e^-87. NaN stays NaN.
inline Vec Exp(Vec x) {
  x = x < -87.0f ? Set(-87.0f) : x;
  const Vec magic = Set(0x1.8p23f);
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = Set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent <<= 23;  // the low bits of `shifted` are n; the sign and the magic bits fall out
  IntVec bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits += exponent;
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <int kStep, int... kLane>
inline void SwapBlocks(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  // Lane l of the first result: a[l] where bit kStep of l is clear, else b[l - kStep]; of the
  // second: a[l + kStep], else b[l].
  const Vec low =
      __builtin_shufflevector(a, b, ((kLane & kStep) == 0 ? kLane : kLane - kStep + kVec)...);
  const Vec high =
      __builtin_shufflevector(a, b, ((kLane & kStep) == 0 ? kLane + kStep : kLane + kVec)...);
  a = low;
  b = high;
}

template <int kStep>
inline void TransposeStage(Vec (&rows)[kVec]) {
  for (int i = 0; i < kVec; ++i) {
    if ((i & kStep) == 0)
      SwapBlocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kVec>());
  }
  if constexpr (kStep * 2 < kVec) TransposeStage<kStep * 2>(rows);
}

// cols[j][t] = rows[t][j]; rows [64][n] -> cols [n][64], n a multiple of 16.
inline void Transpose(const float* rows, int n, float* cols) {
  for (int t = 0; t < kTile; t += kVec) {
    for (int j = 0; j < n; j += kVec) {
      Vec block[kVec];
      for (int i = 0; i < kVec; ++i) block[i] = Load(rows + size_t(t + i) * size_t(n) + j);
      TransposeStage<1>(block);
      for (int i = 0; i < kVec; ++i) Store(cols + size_t(j + i) * kTile + t, block[i]);
    }
  }
}

// score[r][t] = sum_j q[r][j] * cols[j][t]
template <int R>
inline void ScoreKernel(const float* q, size_t q_stride, int k_dim, const float* cols,
                        float* score) {
  for (int c = 0; c < kTile; c += kVec * kColVecs) {
    Vec acc[R][kColVecs];
    Unroll<R * kColVecs>([&](auto i) { acc[i / kColVecs][i % kColVecs] = Vec{}; });
    for (int j = 0; j < k_dim; ++j) {
      Vec key[kColVecs];
      Unroll<kColVecs>([&](auto v) { key[v] = Load(cols + size_t(j) * kTile + c + v * kVec); });
      Unroll<R>([&](auto r) {
        const float x = q[size_t(r) * q_stride + size_t(j)];
        Unroll<kColVecs>([&](auto v) { acc[r][v] += x * key[v]; });
      });
    }
    Unroll<R>([&](auto r) {
      Unroll<kColVecs>([&](auto v) { Store(score + r * kTile + c + v * kVec, acc[r][v]); });
    });
  }
}

template <int R, int kBlock>
inline void ValueBlock(const float* weight, const float* correction, const float* value, int stride,
                       int first_row, int end_row, int c, float* o, int o_stride) {
  Vec acc[R][kBlock];
  Unroll<R>([&](auto r) {
    Unroll<kBlock>([&](auto v) {
      acc[r][v] = Load(o + size_t(r) * size_t(o_stride) + c + v * kVec) * correction[r];
    });
  });
  for (int t = first_row; t < end_row; ++t) {
    Vec x[kBlock];
    Unroll<kBlock>([&](auto v) { x[v] = Load(value + size_t(t) * size_t(stride) + c + v * kVec); });
    Unroll<R>([&](auto r) {
      Unroll<kBlock>([&](auto v) { acc[r][v] += weight[r * kTile + t] * x[v]; });
    });
  }
  Unroll<R>([&](auto r) {
    Unroll<kBlock>(
        [&](auto v) { Store(o + size_t(r) * size_t(o_stride) + c + v * kVec, acc[r][v]); });
  });
}

// o[r] = o[r] * correction[r] + sum_t weight[r][t] * value[t], t over the rows that some query
// sees.
template <int R>
inline void ValueKernel(const float* weight, const float* correction, const float* value,
                        int stride, int first_row, int end_row, float* o, int o_stride) {
  int c = 0;
  for (; c + kVec * kColVecs <= stride; c += kVec * kColVecs) {
    ValueBlock<R, kColVecs>(weight, correction, value, stride, first_row, end_row, c, o, o_stride);
  }
  for (; c < stride; c += kVec)
    ValueBlock<R, 1>(weight, correction, value, stride, first_row, end_row, c, o, o_stride);
}

// Of all lanes, by halves: lane by lane each would wait for the one before.
template <int kHalf = kVec / 2, typename Op>
inline float Reduce(Vec x, Op&& op) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    const Vec other = [&]<size_t... I>(std::index_sequence<I...>) {
      return __builtin_shufflevector(x, x, int((I + kHalf) % kVec)...);
    }
    (std::make_index_sequence<kVec>());
    return Reduce<kHalf / 2>(op(x, other), op);
  }
}

// score [64] of one row with what the mask and the soft cap do to it; returns what it is still to
// be multiplied with.
inline float PlainScores(const QueryBlock& block, int g, uint64_t visible, const uint16_t* mask,
                         float* score) {
  if (block.softcap > 0.0f) {
    for (int t = 0; t < kTile; ++t)
      score[t] = block.softcap * std::tanh(score[t] * block.scale / block.softcap);
  }
  if (block.slope != nullptr) {
    const float scale = block.softcap > 0.0f ? 1.0f : block.scale;
    for (int t = 0; t < kTile; ++t) {
      if (visible >> t & 1) score[t] = score[t] * scale + block.slope[g] * HalfToFloat(mask[t]);
    }
  }
  return block.softcap > 0.0f || block.slope != nullptr ? 1.0f : block.scale;
}

// What sums up to now are multiplied with when the largest score becomes `top`: mostly it is found
// early.
inline float Correction(float before, float top) {
  return before == top                                       ? 1.0f
         : before == -std::numeric_limits<float>::infinity() ? 0.0f
                                                             : std::exp(before - top);
}

// score [64] of one row -> weights e^(s - m); returns the correction of what the state held before.
inline float Softmax(const QueryBlock& block, int g, uint64_t visible, const uint16_t* mask,
                     float* score, float* m, float* d) {
  const float scale = PlainScores(block, g, visible, mask, score);
  const float hidden = -std::numeric_limits<float>::infinity();
  IntVec lane_bit;
  for (int i = 0; i < kVec; ++i) lane_bit[i] = 1 << i;
  Vec largest = Set(hidden);
  for (int t = 0; t < kTile; t += kVec) {
    const IntVec bits = (IntVec{} + int32_t(visible >> t)) & lane_bit;
    Vec s = Load(score + t) * scale;
    s = bits != 0 ? s : Set(hidden);
    Store(score + t, s);
    largest = s > largest ? s : largest;
  }
  const float top = std::max(*m, Reduce(largest, [](Vec a, Vec b) { return a > b ? a : b; }));
  const float correction = Correction(*m, top);
  Vec sum = {};
  for (int t = 0; t < kTile; t += kVec) {
    const IntVec bits = (IntVec{} + int32_t(visible >> t)) & lane_bit;
    Vec p = Exp(Load(score + t) - top);
    p = bits != 0 ? p : Vec{};
    Store(score + t, p);
    sum += p;
  }
  *d = *d * correction + Reduce(sum, [](Vec a, Vec b) { return a + b; });
  *m = top;
  return correction;
}

// Query rows row .. row + n - 1: score [n][64] becomes softmax weights, zeros for a row that sees
// nothing; correction [n] is what the sums so far have to be multiplied with.
inline void SoftmaxRows(const QueryBlock& block, int row, int n, const uint64_t* visible,
                        const uint16_t* const* mask, float* score, const AttentionState& state,
                        float* correction) {
  for (int r = 0; r < n; ++r, score += kTile) {
    const int token = (row + r) / block.group;
    if (visible[token] == 0) {
      std::memset(score, 0, kTile * sizeof(float));
      correction[r] = 1.0f;
      continue;
    }
    correction[r] = Softmax(block, (row + r) % block.group, visible[token],
                            mask != nullptr ? mask[token] : nullptr, score, &state.m[row + r],
                            &state.d[row + r]);
  }
}

// Calls body(row, count) for parts of n_rows rows, with counts of at most kMost as compile-time
// constants.
template <int kMost, typename Body>
inline void InParts(int n_rows, Body&& body, int row = 0) {
  for (; row + kMost <= n_rows; row += kMost) body(row, std::integral_constant<int, kMost>());
  if constexpr (kMost > 1) InParts<kMost - 1>(n_rows, body, row);
}

// What some of the query rows row .. row + n - 1 see.
inline uint64_t SeenBy(const QueryBlock& block, int row, int n, const uint64_t* visible) {
  uint64_t any = 0;
  for (int t = row / block.group, end = (row + n - 1) / block.group; t <= end; ++t)
    any |= visible[t];
  return any;
}

template <int R>
inline void AttendRows(const QueryBlock& block, int row, const uint64_t* visible,
                       const uint16_t* const* mask, const Scratch& scratch, int first_row,
                       int end_row, const AttentionState& state) {
  if (SeenBy(block, row, R, visible) == 0) return;
  float correction[R];
  ScoreKernel<R>(block.q + size_t(row) * block.q_stride, block.q_stride, block.k_dim,
                 scratch.key_cols, scratch.score);
  SoftmaxRows(block, row, R, visible, mask, scratch.score, state, correction);
  ValueKernel<R>(scratch.score, correction, scratch.value, int(PadTo16(block.v_dim)), first_row,
                 end_row, state.o + size_t(row) * size_t(block.o_stride), block.o_stride);
}

// All query rows over a tile that is unpacked.
inline void AttendTile(const QueryBlock& block, uint64_t rows, const uint64_t* visible,
                       const uint16_t* const* mask, const Scratch& scratch,
                       const AttentionState& state) {
  const int first_row = std::countr_zero(rows), end_row = 64 - std::countl_zero(rows);
  InParts<kRows>(block.n_rows, [&](int row, auto n) {
    AttendRows<n()>(block, row, visible, mask, scratch, first_row, end_row, state);
  });
}

// A value that is not finite must not reach queries that do not see its token, and 0 * NaN is NaN:
// the value becomes zero and the key NaN, so that just the queries that see the token get NaN.
inline void Poison(float* key, int k_dim, float* value, int v_dim) {
  for (int j = 0; j < k_dim; ++j) key[j] = std::numeric_limits<float>::quiet_NaN();
  for (int j = 0; j < v_dim; ++j) value[j] = 0.0f;
}

// Rows between the first and the last that nobody sees take part with weight 0: their values must
// be numbers.
inline void ClearHoles(uint64_t rows, float* value, size_t v_stride) {
  const uint64_t span =
      (~uint64_t{0} << std::countr_zero(rows)) & (~uint64_t{0} >> std::countl_zero(rows));
  for (uint64_t holes = span & ~rows; holes != 0; holes &= holes - 1) {
    std::memset(value + size_t(std::countr_zero(holes)) * v_stride, 0, v_stride * sizeof(float));
  }
}

// Half 0 or 1 of a run of the next tile, into the second cache: on their way to the first one its
// lines would take the place of rows that are needed now.
[[gnu::always_inline]] inline void PrefetchNext(const PackedTile& tile, int run, int half) {
  if (tile.next_bytes == 0) return;
  const size_t middle = tile.next_bytes / 128 * 64, end = half == 0 ? middle : tile.next_bytes + 63;
  for (size_t at = half == 0 ? 0 : middle; at < end; at += 64)
    __builtin_prefetch(tile.next[run] + at, 0, 2);
}

[[gnu::always_inline]] inline void PrefetchNext(const PackedTile& tile) {
  for (int run = 0; run < kTile / 16; ++run) {
    for (const int half : {0, 1}) PrefetchNext(tile, run, half);
  }
}

// unpack(t, k, v) puts row t into f32; false when its value is not finite.
template <typename Unpack>
inline void UnpackTile(const QueryBlock& block, uint64_t rows, const Scratch& scratch,
                       Unpack&& unpack) {
  const size_t k_stride = PadTo16(block.k_dim), v_stride = PadTo16(block.v_dim);
  for (uint64_t left = rows; left != 0; left &= left - 1) {
    const size_t t = size_t(std::countr_zero(left));
    float* k = scratch.key_rows + t * k_stride;
    float* v = scratch.value + t * v_stride;
    if (!unpack(t, k, v)) Poison(k, block.k_dim, v, block.v_dim);
  }
  ClearHoles(rows, scratch.value, v_stride);
  Transpose(scratch.key_rows, int(k_stride), scratch.key_cols);
}

// Queries as tiered keys meet them: q . k = (R P q / w) . (R P w k), P the order of the channels
// and R the rotation of the tiers.
inline void PrepareTierRow(const KeyLayout& layout, const KeyWeights& w, const float* q,
                           float* out) {
  for (int i = 0; i < layout.head_dim; ++i) {
    const int j = int(w.order[i]);
    out[i] = q[j] * w.restore[j];
  }
  Rotate(out, layout.head_dim, RotationBlock(layout.per_tier()));
}

// All rows: [n_rows][PadTo16(k_dim)]
inline void PrepareTiers(const KeyLayout& layout, const float* table, const QueryBlock& block,
                         const Scratch& scratch) {
  const KeyWeights w(table, layout.head_dim);
  const size_t stride = PadTo16(layout.head_dim);
  for (int r = 0; r < block.n_rows; ++r) {
    PrepareTierRow(layout, w, block.q + size_t(r) * block.q_stride,
                   scratch.queries + size_t(r) * stride);
  }
}

void AttendPacked(const KeyLayout& key, const ValueLayout& value, const QueryBlock& rows,
                  const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
                  const Scratch& scratch, const AttentionState& state) {
  QueryBlock block = rows;
  if (key.tiered()) {
    block.q = scratch.queries;
    block.q_stride = PadTo16(key.head_dim);
  }
  PrefetchNext(tile);
  const auto unpack = [&](size_t t, float* k, float* v) {
    KeyRow(key, tile.table, tile.key[t / 16] + t % 16 * key.bytes, k);
    return ValueRow(value, tile.value[t / 16] + t % 16 * value.bytes, v);
  };
  UnpackTile(block, tile.rows, scratch, unpack);
  AttendTile(block, tile.rows, visible, mask, scratch, state);
}

inline void UnpackHalves(const QueryBlock& block, const DenseTile& tile, const Scratch& scratch) {
  UnpackTile(block, tile.rows, scratch, [&](size_t t, float* k, float* v) {
    HalfRow(tile.key[t], block.k_dim, k);
    return HalfRow(tile.value[t], block.v_dim, v);
  });
}

void AttendDenseRows(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                     const uint16_t* const* mask, const Scratch& scratch,
                     const AttentionState& state) {
  UnpackHalves(block, tile, scratch);
  AttendTile(block, tile.rows, visible, mask, scratch, state);
}

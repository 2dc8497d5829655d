// AVX-512: few query rows over f16 rows, which are read where they lie. Included inside
// attend_avx512.cc, behind the weights of rows. With more query rows a tile is worth unpacking.
//
// Four keys meet R queries, a channel per lane: sums across lanes are made for four at a time.
// Values are multiplied by weights as they come. Bound by memory up to four query rows.

constexpr int kFewHalves = 8;  // query rows

inline __m512 Halves16(const uint16_t* from, int n) {
  const __mmask16 lanes = n >= 16 ? 0xffff : __mmask16((1u << n) - 1);
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}

// score [R][64] of query rows row .. row + R - 1, in fours of keys with a row in `rows`;
// prefetch(t) is called for the first of each four.
template <int R, typename Prefetch>
inline void HalfScores(const QueryBlock& block, int row, const DenseTile& tile, uint64_t rows,
                       float* score, Prefetch&& prefetch) {
  const float* q = block.q + size_t(row) * block.q_stride;
  for (int t = 0; t < kTile; t += 4) {
    const unsigned four = unsigned(rows >> t) & 15;
    if (four == 0) continue;
    prefetch(t);
    const uint16_t* key[4];
    for (int i = 0; i < 4; ++i)
      key[i] = tile.key[t + ((four >> i & 1) != 0 ? i : std::countr_zero(four))];
    __m512 sum[R][4];
    Unroll<R * 4>([&](auto i) { sum[i / 4][i % 4] = _mm512_setzero_ps(); });
    for (int j = 0; j < block.k_dim; j += 16) {
      const int n = block.k_dim - j;
      const __mmask16 lanes = n >= 16 ? 0xffff : __mmask16((1u << n) - 1);
      __m512 k[4];
      Unroll<4>([&](auto i) { k[i] = Halves16(key[i] + j, n); });
      Unroll<R>([&](auto r) {
        const __m512 x = _mm512_maskz_loadu_ps(lanes, q + size_t(r) * block.q_stride + j);
        Unroll<4>([&](auto i) { sum[r][i] = _mm512_fmadd_ps(x, k[i], sum[r][i]); });
      });
    }
    Unroll<R>([&](auto r) {
      _mm_storeu_ps(score + r * kTile + t, _mm512_castps512_ps128(ReduceRows(sum[r], kSum)));
    });
  }
}

// out [R][o_stride] = o * correction + sum_t weight_t value_t for kVecs vectors of channels from c
// on; whether all of it is finite: a value that is not never makes a sum that is.
template <int R, int kVecs, typename Prefetch>
inline bool HalfValues(const QueryBlock& block, const DenseTile& tile, uint64_t rows,
                       const float* weight, const float* correction, const float* o, int c,
                       float* out, Prefetch&& prefetch) {
  const size_t stride = size_t(block.o_stride);
  __m512 sum[R][kVecs];
  Unroll<R * kVecs>([&](auto i) {
    constexpr int r = i / kVecs, v = i % kVecs;
    sum[r][v] = _mm512_mul_ps(_mm512_loadu_ps(o + r * stride + size_t(c) + 16 * v),
                              _mm512_set1_ps(correction[r]));
  });
  for (uint64_t left = rows; left != 0; left &= left - 1) {
    const int t = std::countr_zero(left);
    if (t % 4 == 0) prefetch(t);
    const uint16_t* value = tile.value[t] + c;
    __m512 x[kVecs];
    Unroll<kVecs>([&](auto v) { x[v] = Halves16(value + 16 * v, block.v_dim - c - 16 * v); });
    Unroll<R>([&](auto r) {
      const __m512 w = _mm512_set1_ps(weight[r * kTile + t]);
      Unroll<kVecs>([&](auto v) { sum[r][v] = _mm512_fmadd_ps(w, x[v], sum[r][v]); });
    });
  }
  __m512 zero = _mm512_setzero_ps();
  Unroll<R * kVecs>([&](auto i) {
    constexpr int r = i / kVecs, v = i % kVecs;
    zero = _mm512_fmadd_ps(sum[r][v], _mm512_setzero_ps(), zero);
    _mm512_storeu_ps(out + r * stride + size_t(c) + 16 * v, sum[r][v]);
  });
  return _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
}

// Query rows row .. row + R - 1.
template <int R, typename Prefetch>
inline void HalfRows(const QueryBlock& block, int row, const DenseTile& tile, uint64_t any,
                     const uint64_t* visible, const uint16_t* const* mask, const Scratch& scratch,
                     const AttentionState& state, Prefetch&& prefetch) {
  const size_t stride = size_t(block.o_stride);
  float* o = state.o + size_t(row) * stride;
  float before[2][R], correction[R];
  std::copy_n(state.m + row, R, before[0]);
  std::copy_n(state.d + row, R, before[1]);
  HalfScores<R>(block, row, tile, any, scratch.score, [&](int t) { prefetch(t, 0); });
  __m512 p[R][4];
  RowWeights<R>(block, row, visible, mask, scratch.score, state, p, correction);
  Unroll<4 * R>([&](auto i) { _mm512_storeu_ps(scratch.score + 16 * i, p[i / 4][i % 4]); });
  bool finite = true;
  InParts<4>(int(stride) / 16, [&](int v, auto n) {
    finite &= HalfValues<R, n()>(block, tile, any, scratch.score, correction, o, 16 * v,
                                 scratch.value, [&](int t) {
                                   if (v == 0) prefetch(t, 1);
                                 });
  });
  if (finite) {
    std::memcpy(o, scratch.value, R * stride * sizeof(float));
    return;
  }
  // Somewhere is a value, or a key, that is no number: rows are unpacked, where it stays with those
  // who see it.
  std::copy_n(before[0], R, state.m + row);
  std::copy_n(before[1], R, state.d + row);
  UnpackHalves(block, tile, scratch);
  AttendRows<R>(block, row, visible, mask, scratch, std::countr_zero(tile.rows),
                64 - std::countl_zero(tile.rows), state);
}

// prefetch(t, half): rows t .. t + 3 are read next, keys or values.
template <typename Prefetch>
inline void AttendHalves(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                         const uint16_t* const* mask, const Scratch& scratch,
                         const AttentionState& state, Prefetch&& prefetch) {
  InParts<4>(block.n_rows, [&](int row, auto n) {
    const uint64_t any = SeenBy(block, row, n, visible);
    if (any == 0) return;
    HalfRows<n()>(block, row, tile, any & tile.rows, visible, mask, scratch, state,
                  [&](int t, int half) {
                    if (row == 0) prefetch(t, half);
                  });
  });
}

inline void AttendPackedHalves(const KeyLayout& key, const ValueLayout& value,
                               const QueryBlock& block, const PackedTile& tile,
                               const uint64_t* visible, const uint16_t* const* mask,
                               const Scratch& scratch, const AttentionState& state) {
  DenseTile rows;
  rows.rows = tile.rows;
  for (uint64_t left = tile.rows; left != 0; left &= left - 1) {
    const size_t t = size_t(std::countr_zero(left));
    const auto at = [&](const uint8_t* run, size_t bytes) {
      return reinterpret_cast<const uint16_t*>(run + t % 16 * bytes);
    };
    rows.key[t] = at(tile.key[t / 16] + key.low_at, key.bytes);
    rows.value[t] = at(tile.value[t / 16], value.bytes);
  }
  // A quarter of a half of the next tile's run with each four rows of this one's.
  const size_t share = (tile.next_bytes / 8 + 63) & ~size_t{63};
  AttendHalves(block, rows, visible, mask, scratch, state, [&](int t, int half) {
    if (tile.next_bytes == 0) return;
    const size_t first = size_t(4 * half + t % 16 / 4) * share;
    for (size_t at = first; at < std::min(first + share, tile.next_bytes); at += 64)
      __builtin_prefetch(tile.next[t / 16] + at, 0, 2);
  });
}

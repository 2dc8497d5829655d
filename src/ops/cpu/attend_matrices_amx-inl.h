// AMX: attention for many query rows as products of matrices of bf16. Included inside
// attend_avx512.cc, behind the bytes, whose ways to unpack it shares.
//
// A float is two bf16, hi + lo, off by 2^-17 of itself at most; a product is hi hi + hi lo + lo hi,
// summed in float. Rows of a tile become operands once for all queries; 16 query rows go together:
//   score [16 queries][64 tokens] = queries [16][channels] . keys [channels][64]
//   o [16 queries][channels] += weights [16][64 tokens] . values [64][channels]
// Levels of trellis-coded values are whole numbers below 256, so bf16 as they are; their units go
// into the weights.

#ifdef SPARKV_EMULATED_AMX
constexpr int kMatrixRows = 1;
#else
// A guess: with fewer query rows, what bytes save in unpacking should count for more.
constexpr int kMatrixRows = 12;
#endif
constexpr int kChunk = 32;  // numbers that a row of an operand holds

inline size_t Chunks(int n) { return size_t(n + kChunk - 1) / kChunk; }

template <typename Body>
inline void EachRow(uint64_t rows, Body&& body) {
  for (; rows != 0; rows &= rows - 1) body(size_t(std::countr_zero(rows)));
}

// 32 bf16: those of a, then those of b.
inline __m512i ToBf16(__m512 a, __m512 b) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(b), "v"(a));
  return both;
}

// x, y -> hi and lo of both, lane i holding x_i below y_i.
[[gnu::always_inline]] inline void SplitPairs(__m512 x, __m512 y, __m512i* hi, __m512i* lo) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
  *hi = _mm512_permutexvar_epi16(turns, ToBf16(x, y));
  const __m512 x_hi = _mm512_castsi512_ps(_mm512_slli_epi32(*hi, 16)),
               y_hi = _mm512_castsi512_ps(_mm512_and_si512(*hi, upper));
  *lo = _mm512_permutexvar_epi16(turns, ToBf16(_mm512_sub_ps(x, x_hi), _mm512_sub_ps(y, y_hi)));
}

// x, y: 32 numbers one behind the other, and so their hi and lo.
[[gnu::always_inline]] inline void SplitRow(__m512 x, __m512 y, void* hi, void* lo) {
  const __m512i both = ToBf16(x, y);
  const auto wide = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  const __m512 x_hi = wide(_mm512_castsi512_si256(both)),
               y_hi = wide(_mm512_extracti64x4_epi64(both, 1));
  _mm512_store_si512(hi, both);
  _mm512_store_si512(lo, ToBf16(_mm512_sub_ps(x, x_hi), _mm512_sub_ps(y, y_hi)));
}

// Numbers first .. first + 15 of n, zeros behind them.
inline __m512 Part16(const float* x, int n, int first) {
  const int left = n - first;
  const __mmask16 lanes = left >= 16  ? 0xffff
                          : left <= 0 ? __mmask16(0)
                                      : __mmask16((1u << left) - 1);
  return _mm512_maskz_loadu_ps(lanes, x + first);
}

// Prepared queries: [groups of 16 rows][hi, lo][chunk][16 rows][32 channels].
inline uint16_t* MatrixQueries(const Scratch& scratch, int k_dim, int row) {
  return reinterpret_cast<uint16_t*>(scratch.queries + size_t(row) * Chunks(k_dim) * kChunk);
}

inline void PrepareMatrixQueries(const KeyLayout& layout, const float* table,
                                 const QueryBlock& block, const Scratch& scratch) {
  const size_t lo = Chunks(block.k_dim) * 16 * kChunk;
  for (int r = 0; r < block.n_rows; ++r) {
    const float* q = block.q + size_t(r) * block.q_stride;
    float tiers[kMaxHeadDim];
    if (layout.tiered()) {
      PrepareTierRow(layout, KeyWeights(table, block.k_dim), q, tiers);
      q = tiers;
    }
    uint16_t* to = MatrixQueries(scratch, block.k_dim, r / 16 * 16) + r % 16 * kChunk;
    for (int j = 0; j < block.k_dim; j += kChunk, to += 16 * kChunk)
      SplitRow(Part16(q, block.k_dim, j), Part16(q, block.k_dim, j + 16), to, to + lo);
  }
}

// A tile's rows as operands. Pairs of bf16 that are multiplied together lie in one lane: two
// channels of a key; values of tokens 16 apart, so that weights need not change lanes.
struct Operands {
  size_t chunks, blocks;          // of 32 channels of keys, of 16 channels of values
  __m512i* key;                   // [run][chunk][hi, lo][16 pairs of channels], 16 tokens
  __m512i* value;                 // [32 tokens][block][hi, lo][16 pairs of tokens], 16 channels
  bool value_lo = false;          // whether values have one
  alignas(64) float unit[kTile];  // of values

  Operands(int k_dim, int v_dim, const Scratch& scratch)
      : chunks(Chunks(k_dim)),
        blocks(PadTo16(v_dim) / 16),
        key(reinterpret_cast<__m512i*>(scratch.operands)),
        value(key + 4 * chunks * 32) {}
  __m512i* Key(int run, size_t chunk) const { return key + (size_t(run) * chunks + chunk) * 32; }
  __m512i* Value(int half, size_t block) const {
    return value + (size_t(half) * blocks + block) * 32;
  }
};

// Keys whose tiers lie as bytes, to floats.
inline void KeyOperands(const KeyLayout& layout, uint64_t rows, const TierBytes& keys,
                        const Operands& to) {
  const int per_tier = layout.per_tier();
  const size_t run_bytes = Padded64(layout.head_dim) * 16;
  for (int run = 0; run < kTile / 16; ++run) {
    if ((rows >> (16 * run) & 0xffff) == 0) continue;
    const auto store = [&](int pair, __m512 x, __m512 y) __attribute__((always_inline)) {
      __m512i* at = to.Key(run, size_t(pair) / 16) + pair % 16;
      SplitPairs(x, y, at, at + 16);
    };
    int c = 0;
    for (; c < layout.head_dim / 4; ++c) {
      const int tier = 4 * c / per_tier;
      if (layout.tier_bits[tier] == 0) break;  // nor have those behind it any
      const __m512 unit = Load(keys.unit[tier] + 16 * run);
      const __m512i levels =
          _mm512_xor_si512(_mm512_load_si512(keys.level + size_t(run) * run_bytes + 64 * size_t(c)),
                           _mm512_set1_epi8(char(0x80)));
      __m512i low = _mm512_setzero_si512();
      const bool wide = WideTier(layout, tier);
      if (wide)
        low = _mm512_load_si512(keys.low + 16 * (size_t(run) * size_t(per_tier) + 4 * size_t(c)));
      const auto channel = [&](unsigned i) __attribute__((always_inline)) {
        __m512i x = _mm512_srai_epi32(_mm512_slli_epi32(levels, 24 - 8 * i), 24);
        if (wide) {
          const __m512i three =
              _mm512_and_si512(_mm512_srli_epi32(low, 8 * i), _mm512_set1_epi32(7));
          x = _mm512_add_epi32(_mm512_slli_epi32(x, 3), three);
        }
        return _mm512_mul_ps(_mm512_cvtepi32_ps(x), unit);
      };
      store(2 * c, channel(0u), channel(1u));
      store(2 * c + 1, channel(2u), channel(3u));
    }
    for (int pair = 2 * c; pair < int(16 * to.chunks); ++pair)
      store(pair, _mm512_setzero_ps(), _mm512_setzero_ps());
  }
}

// Keys as floats: rows [64][stride].
inline void KeyOperands(int k_dim, uint64_t rows, const float* keys, size_t stride,
                        const Operands& to) {
  for (int run = 0; run < kTile / 16; ++run) {
    if ((rows >> (16 * run) & 0xffff) == 0) continue;
    for (size_t chunk = 0; chunk < to.chunks; ++chunk) {
      Vec hi[16], lo[16];
      for (int i = 0; i < 16; ++i) {
        const float* k = keys + size_t(16 * run + i) * stride;
        const int j = int(chunk) * kChunk;
        SplitRow(Part16(k, k_dim, j), Part16(k, k_dim, j + 16), &hi[i], &lo[i]);
      }
      TransposeStage<1>(hi);
      TransposeStage<1>(lo);
      __m512i* at = to.Key(run, chunk);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_ps(at + i, hi[i]);
        _mm512_store_ps(at + 16 + i, lo[i]);
      }
    }
  }
}

// Values as floats: rows [64][16 blocks].
inline void ValueOperands(const float* values, Operands* to) {
  const size_t stride = 16 * to->blocks;
  to->value_lo = true;
  std::fill(to->unit, to->unit + kTile, 1.0f);
  for (int pair = 0; pair < kTile / 2; ++pair) {
    const float* v = values + size_t(pair / 16 * 32 + pair % 16) * stride;
    for (size_t b = 0; b < to->blocks; ++b) {
      __m512i* at = to->Value(pair / 16, b) + pair % 16;
      SplitPairs(Load(v + 16 * b), Load(v + 16 * stride + 16 * b), at, at + 16);
    }
  }
}

// Levels of values as bf16, by code.
struct Bf16Levels {
  alignas(64) uint16_t level[kValueBits + 1][32] = {};
  constexpr Bf16Levels() {
    for (int bits = 1; bits <= kValueBits; ++bits) {
      for (int code = 0; code < 2 << bits; ++code) {
        level[bits][code] =
            uint16_t(std::bit_cast<uint32_t>(float(kTrellisLevels[bits].level[code])) >> 16);
      }
    }
  }
};
constexpr Bf16Levels kBf16Levels;

// Trellis-coded values. A run fills one half of the lanes; where the other one is not there, with
// zeros beside it.
inline void ValueOperands(const ValueLayout& layout, const PackedTile& tile, const Operands& to) {
  const __m512i levels = _mm512_load_si512(kBf16Levels.level[TrellisBits(layout.number)]);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  EachPieceOfRuns(
      layout.planes, tile.rows, [&](int p, int run, const PieceOfRows& piece, auto together) {
        if (p == 0) PrefetchNext(tile, run, 1);
        const size_t first = 4 * size_t(p), n = std::min<size_t>(4, to.blocks - first);
        const bool odd = run % 2 != 0, joins = odd && (tile.rows >> (16 * run - 16) & 0xffff) != 0;
        const __mmask32 words = odd ? 0xaaaaaaaau : 0x55555555u;
        __m512i index[4];  // the low byte of a word of lane i: byte 16 b + i
        for (int b = 0; b < 4; ++b)
          index[b] =
              _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * b)), odd ? 16 : 0);
        piece.EachRow<together()>(
            tile.value[run],
            layout.bytes, [&](auto i, __m512i codes) __attribute__((always_inline)) {
              __m512i* at = to.Value(run / 2, first) + i;
              for (size_t b = 0; b < n; ++b, at += 32) {
                const __m512i x = _mm512_maskz_permutexvar_epi16(
                    words, _mm512_permutexvar_epi8(index[b], codes), levels);
                *at = joins ? _mm512_or_si512(x, *at) : x;
              }
            });
      });
}

// Sixteen query rows of a block on their way through a tile.
struct MatrixGroup {
  alignas(64) float score[16][kTile];
  alignas(64) uint16_t weight[2][2][16][kChunk];  // [32 tokens][hi, lo]
};

// A product is ready long after the next could begin, so a register waits for its turn again until
// the three others had theirs.

// Chunks begin .. end - 1 of score = queries . keys, for the runs that have rows. Sums stay in
// registers 0 .. 3 until the last chunk.
inline void MatrixScores(const uint16_t* queries, const Operands& keys, uint64_t rows, size_t begin,
                         size_t end, MatrixGroup* group) {
  if (begin == 0) Unroll<4>([](auto run) { AmxZero<run>(); });
  for (size_t chunk = begin; chunk < end; ++chunk) {
    const uint16_t* hi = queries + chunk * 16 * kChunk;
    AmxLoad<4>(hi, 64);
    AmxLoad<5>(hi + keys.chunks * 16 * kChunk, 64);
    const auto add = [&](auto query, int part) __attribute__((always_inline)) {
      Unroll<4>([&](auto run) __attribute__((always_inline)) {
        if ((rows >> (16 * run) & 0xffff) == 0) return;
        AmxLoad<6 + run % 2>(keys.Key(run, chunk) + 16 * part, 64);
        AmxAddProducts<run, query(), 6 + run % 2>();
      });
    };
    add(std::integral_constant<int, 4>(), 0);
    add(std::integral_constant<int, 5>(), 0);
    add(std::integral_constant<int, 4>(), 1);
  }
  if (end < keys.chunks) return;
  Unroll<4>([&](auto run) { AmxStore<run>(group->score[0] + 16 * run, sizeof(group->score[0])); });
}

// Scores of the n rows of the group, the first being row `row` of the block -> their weights times
// the units of the values; correction [16]: of what the state held before. Calls beside(quarter)
// after each four rows.
template <typename Beside>
inline void MatrixWeights(const QueryBlock& block, int row, int n, const uint64_t* visible,
                          const uint16_t* const* mask, const Operands& values, MatrixGroup* group,
                          const AttentionState& state, float* correction, Beside&& beside) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000u));
  const auto rounded = [&](__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), half); };
  // The upper halves of x and of y.
  const auto pairs = [&](__m512i x, __m512i y) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, upper, 0xf8);
  };
  RowWeights<16>(
      block, row, n, visible, mask, group->score[0], state,
      correction, [&](auto r, __m512(&p)[4]) __attribute__((always_inline)) {
        __m512i hi[4], lo[4];
        Unroll<4>([&](auto k) __attribute__((always_inline)) {
          p[k] = _mm512_mul_ps(p[k], _mm512_load_ps(values.unit + 16 * k));
          hi[k] = _mm512_and_si512(rounded(p[k]), upper);
          lo[k] = rounded(_mm512_sub_ps(p[k], _mm512_castsi512_ps(hi[k])));
        });
        Unroll<2>([&](auto h) __attribute__((always_inline)) {
          _mm512_store_si512(group->weight[h][0][r], pairs(hi[2 * h], hi[2 * h + 1]));
          _mm512_store_si512(group->weight[h][1][r], pairs(lo[2 * h], lo[2 * h + 1]));
        });
        if constexpr (r % 4 == 3) beside(r / 4);
      });
}

// o += weights . values in steps: the two halves of up to four blocks of 16 channels, then of the
// next blocks. Sums stay in registers 0 .. 3 between the halves.
inline size_t ValueSteps(const Operands& values) { return (values.blocks + 3) / 4 * 2; }

template <int kBlocks>
inline void MatrixValues(const Operands& values, size_t step, uint64_t rows,
                         const MatrixGroup& group, float* o, size_t o_stride) {
  const size_t first = step / 2 * 4;
  const int half = int(step % 2);
  o += 16 * first;
  if (half == 0) Unroll<kBlocks>([&](auto b) { AmxLoad<b>(o + 16 * b, o_stride * sizeof(float)); });
  if ((rows >> (32 * half) & 0xffffffffu) != 0) {
    AmxLoad<4>(group.weight[half][0], 64);
    AmxLoad<5>(group.weight[half][1], 64);
    const auto add = [&](auto weight, int part) __attribute__((always_inline)) {
      Unroll<kBlocks>([&](auto b) __attribute__((always_inline)) {
        AmxLoad<6 + b % 2>(values.Value(half, first + b) + 16 * part, 64);
        AmxAddProducts<b, weight(), 6 + b % 2>();
      });
    };
    add(std::integral_constant<int, 4>(), 0);
    add(std::integral_constant<int, 5>(), 0);
    if (values.value_lo) add(std::integral_constant<int, 4>(), 1);
  }
  if (half == 1)
    Unroll<kBlocks>([&](auto b) { AmxStore<b>(o + 16 * b, o_stride * sizeof(float)); });
}

inline void AttendOperands(const QueryBlock& block, const Operands& operands, uint64_t rows,
                           const uint64_t* visible, const uint16_t* const* mask,
                           const Scratch& scratch, const AttentionState& state) {
  Amx amx;
  const size_t o_stride = size_t(block.o_stride);
  MatrixGroup groups[2];
  const auto scores = [&](int row, size_t begin, size_t end, MatrixGroup* group) {
    MatrixScores(MatrixQueries(scratch, block.k_dim, row), operands, rows, begin, end, group);
  };
  const auto weights = [&](int row, int n, MatrixGroup* group, auto&& beside)
      __attribute__((always_inline)) {
    float correction[16];
    MatrixWeights(block, row, n, visible, mask, operands, group, state, correction, beside);
    for (int r = 0; r < n; ++r) {
      if (correction[r] == 1.0f) continue;
      float* o = state.o + size_t(row + r) * o_stride;
      for (size_t j = 0; j < o_stride; j += 16) Store(o + j, Load(o + j) * correction[r]);
    }
  };
  const auto values = [&](int row, size_t begin, size_t end, const MatrixGroup& group) {
    float* o = state.o + size_t(row) * o_stride;
    for (size_t step = begin; step < end; ++step) {
      InParts<4>(int(std::min<size_t>(4, operands.blocks - step / 2 * 4)),
                 [&](int, auto n) { MatrixValues<n()>(operands, step, rows, group, o, o_stride); });
    }
  };

  // Matrix registers and vector registers work at the same time: while the weights of one group of
  // 16 rows are made, four rows at a time, the scores of the next and the values of the one before
  // are multiplied, a quarter of it all behind each four rows.
  const int whole = block.n_rows / 16 * 16;
  const auto group_from = [&](int row) {
    while (row < whole && SeenBy(block, row, 16, visible) == 0) row += 16;
    return row;
  };
  const size_t n_steps = ValueSteps(operands), half_steps = n_steps / 2, n_chunks = operands.chunks,
               half_chunks = n_chunks / 2;
  int row = group_from(0), before = whole;
  if (row < whole) {
    amx.SetRows(16);
    scores(row, 0, n_chunks, &groups[0]);
  }
  MatrixGroup *here = &groups[0], *there = &groups[1];
  while (row < whole) {
    const int next = group_from(row + 16);
    weights(row, 16, here, [&](int quarter) {
      if (quarter < 2 && next < whole) {
        scores(next, quarter == 0 ? 0 : half_chunks, quarter == 0 ? half_chunks : n_chunks, there);
      } else if (quarter >= 2 && before < whole) {
        values(before, quarter == 2 ? 0 : half_steps, quarter == 2 ? half_steps : n_steps, *there);
      }
    });
    before = std::exchange(row, next);
    std::swap(here, there);
  }
  if (before < whole) values(before, 0, n_steps, *there);

  const int rest = block.n_rows - whole;
  if (rest == 0 || SeenBy(block, whole, rest, visible) == 0) return;
  amx.SetRows(rest);
  scores(whole, 0, n_chunks, here);
  weights(whole, rest, here, [](int) {});
  values(whole, 0, n_steps, *here);
}

// Rows as floats in the scratch, in any basis; nan: rows whose value is not finite. Such a value
// gives no number: its key does, to those who see it.
inline void FloatValues(uint64_t rows, uint64_t nan, int v_dim, const Scratch& scratch,
                        Operands* to) {
  const size_t stride = PadTo16(v_dim);
  for (uint64_t none = nan | ~rows; none != 0; none &= none - 1)
    std::memset(scratch.value + size_t(std::countr_zero(none)) * stride, 0, stride * sizeof(float));
  ValueOperands(scratch.value, to);
}
inline void FloatKeys(uint64_t rows, uint64_t nan, int k_dim, const Scratch& scratch,
                      const Operands& to) {
  const size_t stride = PadTo16(k_dim);
  EachRow(nan, [&](size_t t) {
    std::fill_n(scratch.key_rows + t * stride, k_dim, std::numeric_limits<float>::quiet_NaN());
  });
  KeyOperands(k_dim, rows, scratch.key_rows, stride, to);
}

inline void AttendMatrices(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                           const PackedTile& tile, const uint64_t* visible,
                           const uint16_t* const* mask, const Scratch& scratch,
                           const AttentionState& state) {
  Operands operands(block.k_dim, block.v_dim, scratch);
  uint64_t nan = 0;
  if (value.trellis()) {
    const RowHeads heads(tile.value, value.bytes, tile.rows);
    for (int run = 0; run < kTile / 16; ++run) {
      const unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu;
      float* unit = operands.unit + 16 * run;
      if (rows == 0) {
        _mm512_store_ps(unit, _mm512_setzero_ps());
      } else {
        nan |= uint64_t{ValueUnits(value, heads.Of(run, rows), unit)} << (16 * run);
      }
    }
    ValueOperands(value, tile, operands);
  } else {
    EachRow(tile.rows, [&](size_t t) {
      const uint8_t* row = tile.value[t / 16] + t % 16 * value.bytes;
      if (!ValueRow(value, row, scratch.value + t * PadTo16(block.v_dim))) nan |= uint64_t{1} << t;
    });
    FloatValues(tile.rows, nan, block.v_dim, scratch, &operands);
  }
  if (key.tiered() && TiersByBytes(key)) {
    TierBytes bytes;
    UnpackKeys(key, tile, &bytes);
    EachRow(nan, [&](size_t t) { bytes.FirstUnit()[t] = std::numeric_limits<float>::quiet_NaN(); });
    KeyOperands(key, tile.rows, bytes, operands);
  } else {
    EachRow(tile.rows, [&](size_t t) {
      KeyRow(key, tile.table, tile.key[t / 16] + t % 16 * key.bytes,
             scratch.key_rows + t * PadTo16(block.k_dim));
    });
    FloatKeys(tile.rows, nan, block.k_dim, scratch, operands);
  }
  AttendOperands(block, operands, tile.rows, visible, mask, scratch, state);
}

inline void AttendDenseMatrices(const QueryBlock& block, const DenseTile& tile,
                                const uint64_t* visible, const uint16_t* const* mask,
                                const Scratch& scratch, const AttentionState& state) {
  Operands operands(block.k_dim, block.v_dim, scratch);
  uint64_t nan = 0;
  EachRow(tile.rows, [&](size_t t) {
    HalfRow(tile.key[t], block.k_dim, scratch.key_rows + t * PadTo16(block.k_dim));
    float* v = scratch.value + t * PadTo16(block.v_dim);
    if (!HalfRow(tile.value[t], block.v_dim, v)) nan |= uint64_t{1} << t;
  });
  FloatValues(tile.rows, nan, block.v_dim, scratch, &operands);
  FloatKeys(tile.rows, nan, block.k_dim, scratch, operands);
  AttendOperands(block, operands, tile.rows, visible, mask, scratch, state);
}

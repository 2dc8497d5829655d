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
// With fewer query rows making operands costs more than their products save.
constexpr int kMatrixRows = 24;
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
  if (layout.tiered()) PlaceKeys(layout, scratch);
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
  const int n_pieces = (layout.head_dim + 63) / 64;
  EachPieceOfRuns(
      layout.planes, tile.rows, [&](int p, int run, const PieceOfRows& piece, auto together) {
        const size_t first = 4 * size_t(p), n = std::min<size_t>(4, to.blocks - first);
        const bool odd = run % 2 != 0, joins = odd && (tile.rows >> (16 * run - 16) & 0xffff) != 0;
        const __mmask32 words = odd ? 0xaaaaaaaau : 0x55555555u;
        __m512i index[4];  // the low byte of a word of lane i: byte 16 b + i
        for (int b = 0; b < 4; ++b)
          index[b] =
              _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * b)), odd ? 16 : 0);
        piece.EachRow<together()>(
            tile.value[run], layout.bytes, PrefetchShare(tile, run, 1, p, n_pieces),
            [&](auto i, __m512i codes) __attribute__((always_inline)) {
              __m512i* at = to.Value(run / 2, first) + i;
              for (size_t b = 0; b < n; ++b, at += 32) {
                const __m512i x = _mm512_maskz_permutexvar_epi16(
                    words, _mm512_permutexvar_epi8(index[b], codes), levels);
                *at = joins ? _mm512_or_si512(x, *at) : x;
              }
            });
      });
}

// Query rows on their way through a tile, 16 together: [16 rows][4][64 bytes]. A row's scores, of
// 16 tokens each, become its weights: [32 tokens][hi, lo], 32 bf16 each.
inline float* MatrixRows(const Scratch& scratch, int row) {
  return scratch.weights + size_t(row) * kTile;
}
constexpr size_t kMatrixStride = kTile * sizeof(float);

// A product is ready long after the next could begin, and loads take half as long as products. So
// four sums take turns, of two groups of 16 query rows where there are two.
//
// Registers: sum of group g and run (or block) i in kGroups * i + g, queries (or weights) in 4 and
// on, keys (or values) in 6 and on.
template <int kGroups, int kSum, int kRight>
[[gnu::always_inline]] inline void AddProductsOfGroups() {
  Unroll<kGroups>([](auto g) __attribute__((always_inline)) {
    AmxAddProducts<kGroups * kSum + g, 4 + g, 6 + kRight>();
  });
}

// score = queries . keys for groups of rows at row[0], row[1]. Scores of tokens that are not there
// are anything.
template <int kGroups>
inline void MatrixScores(const int (&row)[kGroups], int k_dim, const Operands& keys, uint64_t rows,
                         const Scratch& scratch) {
  for (int run = 0; run < 4; run += 2) {
    if ((rows >> (16 * run) & 0xffffffffu) == 0) continue;
    Unroll<2 * kGroups>([](auto i) { AmxZero<i>(); });
    for (size_t chunk = 0; chunk < keys.chunks; ++chunk) {
      const auto load_queries = [&](size_t part) __attribute__((always_inline)) {
        Unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
          AmxLoad<4 + g>(
              MatrixQueries(scratch, k_dim, row[g]) + (part * keys.chunks + chunk) * 16 * kChunk,
              64);
        });
      };
      const auto add = [&](int part) __attribute__((always_inline)) {
        Unroll<2>([&](auto i) __attribute__((always_inline)) {
          AmxLoad<6 + i>(keys.Key(run + i, chunk) + 16 * part, 64);
          AddProductsOfGroups<kGroups, i, i>();
        });
      };
      load_queries(0);
      add(1);
      add(0);
      load_queries(1);
      Unroll<2>([](auto i) { AddProductsOfGroups<kGroups, i, i>(); });
    }
    Unroll<2 * kGroups>([&](auto i) {
      AmxStore<i>(MatrixRows(scratch, row[i % kGroups]) + 16 * (run + i / kGroups), kMatrixStride);
    });
  }
}

// Scores of the n <= 16 rows from `row` of the block on -> their weights times the units of the
// values; o is multiplied with what they say of the largest score.
inline void MatrixWeights(const QueryBlock& block, int row, int n, const uint64_t* visible,
                          const uint16_t* const* mask, const Operands& values,
                          const Scratch& scratch, const AttentionState& state) {
  float* rows = MatrixRows(scratch, row);
  float correction[16];
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000u));
  const auto rounded = [&](__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), half); };
  // The upper halves of x and of y.
  const auto pairs = [&](__m512i x, __m512i y) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, upper, 0xf8);
  };
  RowWeights<16>(
      block, row, n, visible, mask, rows, state,
      correction, [&](auto r, __m512(&p)[4]) __attribute__((always_inline)) {
        __m512i hi[4], lo[4];
        Unroll<4>([&](auto k) __attribute__((always_inline)) {
          p[k] = _mm512_mul_ps(p[k], _mm512_load_ps(values.unit + 16 * k));
          hi[k] = _mm512_and_si512(rounded(p[k]), upper);
          lo[k] = rounded(_mm512_sub_ps(p[k], _mm512_castsi512_ps(hi[k])));
        });
        float* to = rows + r * kTile;
        Unroll<2>([&](auto h) __attribute__((always_inline)) {
          _mm512_store_si512(to + 32 * h, pairs(hi[2 * h], hi[2 * h + 1]));
          _mm512_store_si512(to + 32 * h + 16, pairs(lo[2 * h], lo[2 * h + 1]));
        });
      });
  for (int r = 0; r < n; ++r) {
    if (correction[r] == 1.0f) continue;
    float* o = state.o + size_t(row + r) * size_t(block.o_stride);
    for (int j = 0; j < block.o_stride; j += 16) Store(o + j, Load(o + j) * correction[r]);
  }
}

// o += weights . values for kBlocks blocks of 16 channels and groups of rows at row[0], row[1].
template <int kGroups, int kBlocks>
[[gnu::always_inline]] inline void MatrixValues(const int (&row)[kGroups], const Operands& values,
                                                size_t first, uint64_t rows, const Scratch& scratch,
                                                float* o, size_t o_stride) {
  const auto at = [&](int i) __attribute__((always_inline)) {
    return o + size_t(row[i % kGroups]) * o_stride + 16 * (first + size_t(i / kGroups));
  };
  const size_t o_bytes = o_stride * sizeof(float);
  Unroll<kGroups * kBlocks>([&](auto i) { AmxLoad<i>(at(i), o_bytes); });
  for (int half = 0; half < 2; ++half) {
    if ((rows >> (32 * half) & 0xffffffffu) == 0) continue;
    const auto load_weights = [&](int part) __attribute__((always_inline)) {
      Unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
        AmxLoad<4 + g>(MatrixRows(scratch, row[g]) + 32 * half + 16 * part, kMatrixStride);
      });
    };
    const auto add = [&](int part) __attribute__((always_inline)) {
      Unroll<kBlocks>([&](auto b) __attribute__((always_inline)) {
        AmxLoad<6 + b>(values.Value(half, first + b) + 16 * part, 64);
        AddProductsOfGroups<kGroups, b, b>();
      });
    };
    load_weights(0);
    if (values.value_lo) add(1);
    add(0);
    load_weights(1);
    Unroll<kBlocks>([](auto b) { AddProductsOfGroups<kGroups, b, b>(); });
  }
  Unroll<kGroups * kBlocks>([&](auto i) { AmxStore<i>(at(i), o_bytes); });
}
template <int kGroups>
inline void MatrixValues(const int (&row)[kGroups], const Operands& values, uint64_t rows,
                         const Scratch& scratch, float* o, size_t o_stride) {
  size_t b = 0;
  for (; b + 2 <= values.blocks; b += 2)
    MatrixValues<kGroups, 2>(row, values, b, rows, scratch, o, o_stride);
  if (b < values.blocks) MatrixValues<kGroups, 1>(row, values, b, rows, scratch, o, o_stride);
}

// All scores, then all weights, then all sums: beside matrix products, vector instructions find
// half of their units taken, and matrix units that were idle for a thousand cycles take 700 to
// wake.
inline void AttendOperands(const QueryBlock& block, const Operands& operands, uint64_t rows,
                           const uint64_t* visible, const uint16_t* const* mask,
                           const Scratch& scratch, const AttentionState& state) {
  const auto seen_from = [&](int row) {
    while (row < block.n_rows && SeenBy(block, row, std::min(16, block.n_rows - row), visible) == 0)
      row += 16;
    return row;
  };
  // Calls body(rows of two groups) and, for what is left of those that begin below `end`,
  // body(row).
  const auto each_group = [&](int end, auto&& body) {
    for (int row = seen_from(0); row < end;) {
      const int next = seen_from(row + 16);
      if (next < end) {
        body({row, next});
        row = seen_from(next + 16);
      } else {
        body({row});
        row = next;
      }
    }
  };
  const int whole = block.n_rows / 16 * 16, rest = block.n_rows - whole;
  const size_t o_stride = size_t(block.o_stride);
  Amx amx;
  amx.SetRows(16);
  each_group(block.n_rows, [&]<int N>(const int(&row)[N]) {
    MatrixScores(row, block.k_dim, operands, rows, scratch);
  });
  for (int row = seen_from(0); row < block.n_rows; row = seen_from(row + 16)) {
    MatrixWeights(block, row, std::min(16, block.n_rows - row), visible, mask, operands, scratch,
                  state);
  }
  const auto values = [&]<int N>(const int(&row)[N]) {
    MatrixValues(row, operands, rows, scratch, state.o, o_stride);
  };
  each_group(whole, values);
  if (rest == 0 || SeenBy(block, whole, rest, visible) == 0) return;
  amx.SetRows(rest);
  values({whole});
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
    UnpackKeys(key, PlacedKeys(scratch), tile, &bytes);
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

// AVX-512: attention over packed rows as products of bytes. Included inside attend_avx512.cc,
// behind the rows of which it reads pieces.

// ---- integer keys and values: products of bytes ----
//
// Queries are split into three bytes and softmax weights into two, or three where one is heavy, so
// that packed codes are multiplied as they are, four at a time, and never become floats. Tokens lie
// in lanes: no sums across a register.
//   score[t] = unit[t] sum_kept q_j level_tj + magnitude[t] sum_pruned +-w_j,  w_j = q_j restore_j
//   sum_pruned +-w_j = sum_j w_j (s_tj - 1) with s = 2 for +, 1 for kept, 0 for -

// sum + a . b in every lane, a unsigned and b signed bytes. Assembly, because gcc 12 copies the sum
// before and after the intrinsic.
inline __m512i AddProducts(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
// The same with four bytes b for all lanes.
inline __m512i AddProducts(__m512i sum, __m512i a, const int32_t& b) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(b));
  return sum;
}

// A number is scale (65536 digit0 + 256 digit1 + digit2), the digits signed bytes. Digits of a
// vector lie [four channels][kDigits][4].
constexpr int kDigits = 3;
constexpr float kDigitsTop = 127.0f * 65536.0f;

// A query row, and behind it the digits of q and of w, each padded to 64 channels. With tiers only
// of q, in their order and basis.
struct PreparedRow {
  float q_scale, w_scale;
  // What the offset of the other operand (128 for levels, 1 for signs) adds to the sums with the
  // digits of q and of w, or of q in each tier, negative.
  int32_t bias[kDigits * kTiers];
  int32_t unused[2];
};
static_assert(sizeof(PreparedRow) == 64);
inline size_t Padded64(int n) { return size_t(n + 63) / 64 * 64; }
inline PreparedRow* PreparedAt(const Scratch& scratch, int k_dim, int row) {
  return reinterpret_cast<PreparedRow*>(scratch.queries +
                                        size_t(row) * (Padded64(k_dim) / 2 * kDigits + 16));
}
inline int8_t* PreparedBytes(PreparedRow* row) { return reinterpret_cast<int8_t*>(row + 1); }
// Four channels that meet a query together are in one tier.
inline bool TiersByBytes(const KeyLayout& layout) { return layout.per_tier() % 4 == 0; }

// Digits of x [n] (times y, if given). Not finite: the scale is NaN.
inline void Split(const float* x, const float* y, int n, float* scale, int8_t* digits) {
  const auto at = [&](int j) {
    const __mmask16 lanes = n - j >= 16 ? 0xffff : __mmask16((1u << (n - j)) - 1);
    const __m512 a = _mm512_maskz_loadu_ps(lanes, x + j);
    return y != nullptr ? _mm512_mul_ps(a, _mm512_maskz_loadu_ps(lanes, y + j)) : a;
  };
  __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int j = 0; j < n; j += 16) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(at(j)));
    poison = _mm512_fmadd_ps(at(j), _mm512_setzero_ps(), poison);
  }
  const float top = _mm512_reduce_max_ps(largest);
  const bool any = top > 1e-30f;
  *scale = (any ? top / kDigitsTop : 0.0f) + _mm512_reduce_add_ps(poison);
  const __m512 inverse = _mm512_set1_ps(any ? kDigitsTop / top : 0.0f);
  // Bytes of a number + 0x808080 are its digits + 128, the last digit first.
  const __m512i half = _mm512_set1_epi32(0x808080);
  // Lane 3 c + d: digit d of the numbers 4 c .. 4 c + 3.
  const __m512i order = _mm512_setr_epi32(
      0x0e0a0602, 0x0d090501, 0x0c080400, 0x1e1a1612, 0x1d191511, 0x1c181410, 0x2e2a2622,
      0x2d292521, 0x2c282420, 0x3e3a3632, 0x3d393531, 0x3c383430, 0, 0, 0, 0);
  for (int j = 0; j < n; j += 16) {
    const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(at(j), inverse));
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(number, half), half);
    _mm512_mask_storeu_epi32(digits + kDigits * j, 0x0fff, _mm512_permutexvar_epi8(order, bytes));
  }
}

// bias[d] = -offset * sum of digit d of n numbers.
inline void Bias(int offset, const int8_t* digits, int n, int32_t* bias) {
  __m128i sum = _mm_setzero_si128();
  for (int c = 0; c < n / 4; ++c) {
    sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(char(offset)),
                           _mm_maskz_loadu_epi32(7, digits + 4 * kDigits * c));
  }
  _mm_mask_storeu_epi32(bias, 7, _mm_sub_epi32(_mm_setzero_si128(), sum));
}

#include "ops/cpu/codes_avx512-inl.h"

void PrepareQueries(const KeyLayout& layout, const float* table, const QueryBlock& block,
                    const Scratch& scratch) {
  if (layout.tiered() && !TiersByBytes(layout)) return PrepareTiers(layout, table, block, scratch);
  if (layout.number == SPARKV_F16) return;
  if (layout.tiered()) PlaceKeys(layout, scratch);
  const int n = block.k_dim;
  for (int r = 0; r < block.n_rows; ++r) {
    PreparedRow* row = PreparedAt(scratch, n, r);
    int8_t* digits = PreparedBytes(row);
    const float* q = block.q + size_t(r) * block.q_stride;
    if (layout.tiered()) {
      float x[kMaxHeadDim];
      PrepareTierRow(layout, KeyWeights(table, n), q, x);
      Split(x, nullptr, n, &row->q_scale, digits);
      for (int t = 0, per_tier = layout.per_tier(); t < kTiers; ++t)
        Bias(128, digits + kDigits * t * per_tier, per_tier, row->bias + kDigits * t);
      continue;
    }
    Split(q, nullptr, n, &row->q_scale, digits);
    Bias(128, digits, n, row->bias);
    if (layout.sign_bytes == 0) continue;
    digits += kDigits * Padded64(n);
    Split(q, KeyWeights(table, n).restore, n, &row->w_scale, digits);
    Bias(1, digits, n, row->bias + kDigits);
  }
}

// 2^(((e - 1) mod steps) / steps + octave) of a grid whose table of one octave is given; lanes with
// e = 0 are zero.
template <int kSteps, int kBias>
inline __m512 GridValues(__m512i e) {
  const __m512i place = _mm512_sub_epi32(e, _mm512_set1_epi32(1));
  const __m512i octave = _mm512_sub_epi32(
      _mm512_srai_epi32(place, std::countr_zero(unsigned(kSteps))), _mm512_set1_epi32(kBias));
  const auto value = [&](__m512 mantissa) {
    const __m512i bits =
        _mm512_add_epi32(_mm512_castps_si512(mantissa), _mm512_slli_epi32(octave, 23));
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(e, e), _mm512_castsi512_ps(bits));
  };
  if constexpr (kSteps == 4) {
    const __m512 quarters = _mm512_broadcast_f32x4(
        _mm_setr_ps(kPow2Table[0], kPow2Table[16], kPow2Table[32], kPow2Table[48]));
    return value(_mm512_permutevar_ps(quarters, place));
  }
  const __m512i index = _mm512_slli_epi32(_mm512_and_si512(place, _mm512_set1_epi32(kSteps - 1)),
                                          std::countr_zero(unsigned(64 / kSteps)));
  const __m512 a =
      _mm512_permutex2var_ps(_mm512_loadu_ps(kPow2Table), index, _mm512_loadu_ps(kPow2Table + 16));
  const __m512 b = _mm512_permutex2var_ps(_mm512_loadu_ps(kPow2Table + 32), index,
                                          _mm512_loadu_ps(kPow2Table + 48));
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  return value(_mm512_mask_mov_ps(a, upper, b));
}

// The first four bytes of the rows of a tile, where scales and gains are. To be made well before
// they are wanted: a vector of words that were stored one by one waits until the last is written.
struct RowHeads {
  alignas(64) uint32_t word[kTile];
  RowHeads(const uint8_t* const* runs, size_t bytes, uint64_t rows) {
    for (int run = 0; run < kTile / 16; ++run) {
      if ((rows >> (16 * run) & 0xffff) == 0) continue;
      for (int i = 0; i < 16; ++i)
        std::memcpy(&word[16 * run + i], runs[run] + size_t(i) * bytes, 4);
    }
  }
  // Of 16 rows, zero for those that are not there.
  __m512i Of(int run, unsigned rows) const {
    return _mm512_maskz_load_epi32(__mmask16(rows), word + 16 * run);
  }
};

// Four rows by four words in each block of 128 bits. Written out, as what follows: from a shuffle
// by index gcc 12 makes one with two sources that destroys one of them.
[[gnu::always_inline]] inline void TurnBlocks(__m512i* row) {
  const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]),
                b = _mm512_unpackhi_epi32(row[0], row[1]),
                c = _mm512_unpacklo_epi32(row[2], row[3]),
                d = _mm512_unpackhi_epi32(row[2], row[3]);
  row[0] = _mm512_unpacklo_epi64(a, c), row[1] = _mm512_unpackhi_epi64(a, c);
  row[2] = _mm512_unpacklo_epi64(b, d), row[3] = _mm512_unpackhi_epi64(b, d);
}

// Word c of lane t = word t of x[c] before, in x[c].
inline void TransposeWords(__m512i (&x)[16]) {
  Unroll<4>([&](auto g) __attribute__((always_inline)) { TurnBlocks(x + 4 * g); });
  __m512i y[16];
  Unroll<4>([&](auto k) __attribute__((always_inline)) {
    const __m512i a = _mm512_shuffle_i32x4(x[k], x[4 + k], 0x88),
                  b = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0x88),
                  c = _mm512_shuffle_i32x4(x[k], x[4 + k], 0xdd),
                  d = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0xdd);
    y[k] = _mm512_shuffle_i32x4(a, b, 0x88), y[4 + k] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[8 + k] = _mm512_shuffle_i32x4(a, b, 0xdd), y[12 + k] = _mm512_shuffle_i32x4(c, d, 0xdd);
  });
  std::copy_n(y, 16, x);
}

// The same with 8 words of rows 8 g + i and 8 g + i + 4 in x[4 g + i].
inline void TransposeWords(__m512i (&x)[8]) {
  Unroll<2>([&](auto g) __attribute__((always_inline)) { TurnBlocks(x + 4 * g); });
  Unroll<4>([&](auto k) __attribute__((always_inline)) {
    const __m512i a = x[k], b = x[4 + k];
    x[k] = _mm512_shuffle_i32x4(a, b, 0x88), x[4 + k] = _mm512_shuffle_i32x4(a, b, 0xdd);
  });
}

// Keys of a tile as bytes with tokens in lanes: [run][quad of channels][16 tokens][4].
struct KeyBytes {
  alignas(64) uint8_t level[kTile * kMaxHeadDim];  // 128 + level, 128 where pruned
  alignas(64) uint8_t sign[kTile * kMaxHeadDim];   // s
  alignas(64) float unit[kTile], magnitude[kTile];
  float* FirstUnit() { return unit; }
};

template <sparkv_number kNumber>
inline void UnpackRun(const KeyLayout& layout, const uint8_t* rows16, unsigned rows,
                      const RowHeads& heads, int run, KeyBytes* out) {
  const int n = layout.head_dim, n_pieces = (n + 63) / 64;
  alignas(64) uint8_t level[kMaxHeadDim / 64][16][64];
  alignas(64) uint64_t kept[kMaxHeadDim / 64][16], plus[kMaxHeadDim / 64][16];
  const __m512i none = _mm512_set1_epi8(char(0x80));
  for (int i = 0; i < 16; ++i) {
    if ((rows >> i & 1) != 0) {
      KeyPieces<kNumber>(
          layout, rows16 + size_t(i) * layout.bytes, _mm512_setzero_si512(),
          [&](int j, uint64_t mask, __m512i levels, uint64_t positive)
              __attribute__((always_inline)) {
                _mm512_store_si512(level[j / 64][i], _mm512_xor_si512(levels, none));
                kept[j / 64][i] = mask;
                plus[j / 64][i] = positive;
              });
    } else {
      for (int p = 0; p < n_pieces; ++p) {
        _mm512_store_si512(level[p][i], none);
        kept[p][i] = plus[p][i] = 0;
      }
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  // Four bits -> four bytes.
  const __m512i ones =
      _mm512_setr_epi32(0x00000000, 0x00000001, 0x00000100, 0x00000101, 0x00010000, 0x00010001,
                        0x00010100, 0x00010101, 0x01000000, 0x01000001, 0x01000100, 0x01000101,
                        0x01010000, 0x01010001, 0x01010100, 0x01010101);
  const __m512i twos = _mm512_add_epi32(ones, ones);
  for (int p = 0; p < n_pieces; ++p) {
    __m512i block[16];
    for (int i = 0; i < 16; ++i) block[i] = _mm512_load_si512(level[p][i]);
    TransposeWords(block);
    uint8_t* to = out->level + (size_t(run) * size_t(n_pieces) + size_t(p)) * 1024;
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, block[i]);
    if (layout.sign_bytes == 0) continue;
    to = out->sign + (size_t(run) * size_t(n_pieces) + size_t(p)) * 1024;
    const __m512i k0 = _mm512_load_si512(kept[p]), k1 = _mm512_load_si512(kept[p] + 8);
    const __m512i p0 = _mm512_load_si512(plus[p]), p1 = _mm512_load_si512(plus[p] + 8);
    const auto half = [&](__m512i kept32, __m512i plus32, uint8_t* at) {
      for (int c = 0; c < 8; ++c) {
        const __m512i s = _mm512_add_epi32(
            _mm512_permutexvar_epi32(_mm512_srli_epi32(kept32, unsigned(4 * c)), ones),
            _mm512_permutexvar_epi32(_mm512_srli_epi32(plus32, unsigned(4 * c)), twos));
        _mm512_store_si512(at + 64 * c, s);
      }
    };
    half(_mm512_permutex2var_epi32(k0, even, k1), _mm512_permutex2var_epi32(p0, even, p1), to);
    half(_mm512_permutex2var_epi32(k0, odd, k1), _mm512_permutex2var_epi32(p0, odd, p1), to + 512);
  }
  const __m512i words = _mm512_and_si512(heads.Of(run, rows), _mm512_set1_epi32(0xffff));
  const __m512i e = _mm512_and_si512(words, _mm512_set1_epi32(1023));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(kKeyScaleNotFinite));
  const __m512 largest = GridValues<32, 16>(e);
  const __m512 unit = _mm512_mul_ps(largest, _mm512_set1_ps(kLevelUnit));
  _mm512_store_ps(
      out->unit + 16 * run,
      _mm512_mask_mov_ps(unit, nan, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN())));
  // ratio = 2^((9 - r) / 4): a grid of four steps, read backwards.
  const __m512i r = _mm512_srli_epi32(words, 10);
  const __m512i quarter = _mm512_sub_epi32(_mm512_set1_epi32(kRatioOne + 64 + 1), r);
  const __m512 ratio =
      _mm512_maskz_mov_ps(_mm512_test_epi32_mask(r, r), GridValues<4, 16>(quarter));
  _mm512_store_ps(out->magnitude + 16 * run, _mm512_maskz_mul_ps(__mmask16(~nan), largest, ratio));
}

struct QueryDigits {
  const int32_t (*digits)[kDigits];  // of four channels
  const int32_t* bias;
};
// Channels `first` (a multiple of 4) and on, with bias number `part`.
inline QueryDigits DigitsAt(PreparedRow* row, size_t first, int part) {
  return {reinterpret_cast<const int32_t(*)[kDigits]>(PreparedBytes(row) + kDigits * first),
          row->bias + kDigits * part};
}

// Products of the first kUsed digits of R query rows with 16 tokens, biased if kBias:
//   out[r] = sum_d 256^(kDigits - 1 - d) (digit_d . bytes + bias_d)
template <int kUsed, bool kBias, int R>
[[gnu::always_inline]] inline void ByteProducts(const QueryDigits (&query)[R], int n_quads,
                                                const uint8_t* bytes, Vec (&out)[R]) {
  __m512i sum[R][kUsed];
  Unroll<R * kUsed>([&](auto i) {
    sum[i / kUsed][i % kUsed] = _mm512_set1_epi32(kBias ? query[i / kUsed].bias[i % kUsed] : 0);
  });
  for (int c = 0; c < n_quads; ++c) {
    const __m512i k = _mm512_load_si512(bytes + 64 * c);
    Unroll<R * kUsed>([&](auto i) {
      __m512i& to = sum[i / kUsed][i % kUsed];
      to = AddProducts(to, k, query[i / kUsed].digits[c][i % kUsed]);
    });
  }
  Unroll<R>([&](auto r) {
    // 256 times 512 products of 127 and 127 are below 2^31.
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[r][0], 8), sum[r][1]));
    // Times 256 by its exponent, because the multipliers have the products to do: 0 becomes 2^-119.
    out[r] = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(high), _mm512_set1_epi32(8 << 23)));
    if constexpr (kUsed == kDigits) out[r] += _mm512_cvtepi32_ps(sum[r][2]);
  });
}

// score [R][64] of query rows row .. row + R - 1.
template <int R>
inline void ByteScores(const KeyLayout& layout, int row, const KeyBytes& keys, uint64_t any,
                       const Scratch& scratch) {
  const size_t padded = Padded64(layout.head_dim), run_bytes = padded * 16;
  const int n_quads = layout.head_dim / 4;
  PreparedRow* prepared[R];
  QueryDigits q[R], w[R];
  for (int r = 0; r < R; ++r) {
    prepared[r] = PreparedAt(scratch, layout.head_dim, row + r);
    q[r] = DigitsAt(prepared[r], 0, 0);
    w[r] = DigitsAt(prepared[r], padded, 1);
  }
  for (int run = 0; run < 4; ++run) {
    if ((any >> (16 * run) & 0xffff) == 0) continue;
    Vec score[R];
    ByteProducts<kDigits, true>(q, n_quads, keys.level + size_t(run) * run_bytes, score);
    const Vec unit = Load(keys.unit + 16 * run);
    Unroll<R>([&](auto r) { score[r] *= unit * prepared[r]->q_scale; });
    if (layout.sign_bytes != 0) {
      Vec pruned[R];
      ByteProducts<kDigits, true>(w, n_quads, keys.sign + size_t(run) * run_bytes, pruned);
      const Vec magnitude = Load(keys.magnitude + 16 * run);
      Unroll<R>([&](auto r) { score[r] += pruned[r] * (magnitude * prepared[r]->w_scale); });
    }
    Unroll<R>([&](auto r) { Store(scratch.score + r * kTile + 16 * run, score[r]); });
  }
}

// ---- trellis-coded keys and values as bytes ----

// Levels of up to 5 bits as bytes, by code, whatever lies above it in the byte; those of 6 and 7
// bits as 8 (high - 128) + low.
constexpr int kByteBits = 5;
struct CodeTables {
  alignas(64) int8_t level[kByteBits + 1][64] = {};
  alignas(64) uint8_t centred[kByteBits + 1][64] = {};  // 128 + level
  alignas(64) uint8_t high[2][256] = {}, low[2][256] = {};
  constexpr CodeTables() {
    for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
      const TrellisLevels& levels = kTrellisLevels[bits];
      const int codes = 2 << bits;
      for (int i = 0; i < (bits <= kByteBits ? 64 : codes); ++i) {
        const int x = levels.level[i % codes];
        if (bits <= kByteBits) {
          level[bits][i] = int8_t(x);
          centred[bits][i] = uint8_t(128 + x);
        } else {
          high[bits - 6][i] = uint8_t((x + 1024) >> 3);
          low[bits - 6][i] = uint8_t((x + 1024) & 7);
        }
      }
    }
  }
};
constexpr CodeTables kCodes;

// table [2 << kBits] at the codes of 64 numbers of 6 or 7 bits.
template <int kBits>
inline __m512i LookUp(const uint8_t* table, __m512i code) {
  const auto half = [&](const uint8_t* at) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(at), code, _mm512_load_si512(at + 64));
  };
  if constexpr (kBits == 6) return half(table);
  return _mm512_mask_mov_epi8(half(table), _mm512_movepi8_mask(code), half(table + 128));
}

// Gains of tiers by their code.
struct GainTable {
  alignas(64) float gain[64] = {};
  constexpr GainTable() {
    for (int e = 0; e < kTierGainNotFinite; ++e) gain[e] = TierGainGrid::Value(e);
    gain[kTierGainNotFinite] = std::numeric_limits<float>::quiet_NaN();
  }
};
constexpr GainTable kGains;

inline __m512 TierGains(__m512i code) {
  const auto half = [&](const float* at) {
    return _mm512_permutex2var_ps(_mm512_load_ps(at), code, _mm512_load_ps(at + 16));
  };
  return _mm512_mask_mov_ps(half(kGains.gain), _mm512_test_epi32_mask(code, _mm512_set1_epi32(32)),
                            half(kGains.gain + 32));
}

// Tiered keys of a tile as bytes with tokens in lanes: [run][quad of channels][16 tokens][4].
struct TierBytes {
  alignas(64) uint8_t level[kTile * kMaxHeadDim];         // 128 + level
  alignas(64) uint8_t low[kTile * kMaxHeadDim / kTiers];  // of the first tier, if it has 6 bits or
                                                          // more; its levels are 8 times that much
  alignas(64) float unit[kTiers][kTile];
  float* FirstUnit() { return unit[0]; }
};

inline bool WideTier(const KeyLayout& layout, int tier) {
  return layout.tier_bits[tier] > kByteBits;
}

// Rows that are not there give codes as well; without a unit they score zero.
inline void UnpackKeyPieces(const KeyLayout& layout, const PackedTile& tile, TierBytes* out) {
  const int per_tier = layout.per_tier(), n_pieces = (layout.head_dim + 63) / 64;
  int8_t quad_bits[kMaxHeadDim / 4 + 16] = {};  // of four numbers; behind the last one anything
  for (int t = 0; t < kTiers; ++t)
    std::fill_n(quad_bits + t * per_tier / 4, per_tier / 4, int8_t(layout.tier_bits[t]));
  EachPieceOfRuns(
      layout.planes, tile.rows, [&](int p, int run, const PieceOfRows& piece, auto together) {
        __m512i block[16];
        piece.EachRow<together()>(
            tile.key[run], layout.bytes, PrefetchShare(tile, run, 0, p, n_pieces),
            [&](auto i, __m512i codes) __attribute__((always_inline)) { block[i] = codes; });
        TransposeWords(block);
        uint8_t* to = out->level + (size_t(run) * size_t(n_pieces) + size_t(p)) * 1024;
        uint8_t* low = out->low + 16 * (run * per_tier + 64 * p);
        // Codes stay in registers: which one is looked up where must not depend on a variable.
        Unroll<16>([&](auto c) __attribute__((always_inline)) {
          const __m512i code = block[c];
          const int bits = quad_bits[16 * p + c];
          const auto wide = [&](auto b) __attribute__((always_inline)) {
            _mm512_store_si512(to + 64 * c, LookUp<b()>(kCodes.high[b - 6], code));
            _mm512_store_si512(low + 64 * c, LookUp<b()>(kCodes.low[b - 6], code));
          };
          if (bits == 7) {
            wide(std::integral_constant<int, 7>());
          } else if (bits == 6) {
            wide(std::integral_constant<int, 6>());
          } else {
            _mm512_store_si512(to + 64 * c, _mm512_permutexvar_epi8(
                                                code, _mm512_load_si512(kCodes.centred[bits])));
          }
        });
      });
}

// Several codes lie in a byte. kWide: bits of the first tier if they are more than a byte's;
// kApart: joint.apart.
template <int kRows, int kWide, bool kApart>
inline void UnpackJointKeys(const KeyLayout& layout, const JointKeys& joint, const PackedTile& tile,
                            TierBytes* out) {
  constexpr int kVectors = 16 / kRows, kHalf = kVectors / 2;
  const int* bits = layout.tier_bits;
  const __m512i first = _mm512_load_si512(kCodes.centred[kWide > 0 ? 0 : bits[0]]),
                second = _mm512_load_si512(kCodes.centred[bits[1]]),
                third = _mm512_load_si512(kCodes.centred[bits[2]]),
                last = _mm512_load_si512(kCodes.centred[bits[3]]);
  const __m512i to_third = BitsFrom(joint.low[2]), to_last = BitsFrom(joint.low[3]);
  for (int run = 0; run < kTile / 16; ++run) {
    if ((tile.rows >> (16 * run) & 0xffff) == 0) continue;
    const PrefetchShare next(tile, run, 0, 0, 1);
    __m512i block[kVectors];
    Unroll<kVectors>([&](auto v) __attribute__((always_inline)) {
      constexpr int kRow = kRows == 1 ? v : v / 4 * 8 + v % 4;
      next.Row(kRow);
      if constexpr (kRows == 2) next.Row(kRow + 4);
      block[v] = joint.Codes<kRows>(tile.key[run] + size_t(kRow) * layout.bytes, layout.bytes);
    });
    TransposeWords(block);
    uint8_t* to = out->level + run * kVectors * 128;
    uint8_t* low = out->low + run * kVectors * 32;
    const auto store = [&](int quad, __m512i levels) {
      _mm512_store_si512(to + 64 * quad, levels);
    };
    Unroll<kHalf>([&](auto c) __attribute__((always_inline)) {
      const __m512i code = block[c], other = block[kHalf + c];
      if constexpr (kWide > 0) {
        store(c, LookUp<kWide>(kCodes.high[kWide - 6], code));
        _mm512_store_si512(low + 64 * c, LookUp<kWide>(kCodes.low[kWide - 6], code));
      } else {
        store(c, _mm512_permutexvar_epi8(code, first));
      }
      store(kHalf + c, _mm512_permutexvar_epi8(other, second));
      store(2 * kHalf + c,
            _mm512_permutexvar_epi8(_mm512_gf2p8affine_epi64_epi8(other, to_third, 0), third));
      store(3 * kHalf + c,
            _mm512_permutexvar_epi8(
                _mm512_gf2p8affine_epi64_epi8(kApart ? other : code, to_last, 0), last));
    });
  }
}

void UnpackKeys(const KeyLayout& layout, const JointKeys& joint, const PackedTile& tile,
                TierBytes* out) {
  const RowHeads heads(tile.key, layout.bytes, tile.rows);
  if (joint.fits) {
    const auto unpack = [&](auto rows, auto wide) {
      return joint.apart ? UnpackJointKeys<rows(), wide(), true>(layout, joint, tile, out)
                         : UnpackJointKeys<rows(), wide(), false>(layout, joint, tile, out);
    };
    const auto with_rows = [&](auto rows) {
      if (layout.tier_bits[0] == 7) return unpack(rows, std::integral_constant<int, 7>());
      if (layout.tier_bits[0] == 6) return unpack(rows, std::integral_constant<int, 6>());
      unpack(rows, std::integral_constant<int, 0>());
    };
    if (layout.head_dim == 128) {
      with_rows(std::integral_constant<int, 1>());
    } else {
      with_rows(std::integral_constant<int, 2>());
    }
  } else {
    UnpackKeyPieces(layout, tile, out);
  }
  for (int run = 0; run < kTile / 16; ++run) {
    const unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu;
    if (rows == 0) continue;
    const __m512i words = heads.Of(run, rows);
    for (int t = 0; t < kTiers; ++t) {
      const __m512i code =
          _mm512_and_si512(_mm512_srli_epi32(words, unsigned(6 * t)), _mm512_set1_epi32(63));
      _mm512_store_ps(
          out->unit[t] + 16 * run,
          _mm512_mul_ps(TierGains(code),
                        _mm512_set1_ps(kTrellisLevels[layout.tier_bits[t]].inverse_top)));
    }
  }
}

template <int R>
inline void ByteScores(const KeyLayout& layout, int row, const TierBytes& keys, uint64_t any,
                       const Scratch& scratch) {
  const size_t padded = Padded64(layout.head_dim), run_bytes = padded * 16;
  const size_t per_tier = size_t(layout.per_tier());
  PreparedRow* prepared[R];
  for (int r = 0; r < R; ++r) prepared[r] = PreparedAt(scratch, layout.head_dim, row + r);
  for (int run = 0; run < 4; ++run) {
    if ((any >> (16 * run) & 0xffff) == 0) continue;
    Vec score[R] = {};
    for (int t = 0; t < kTiers && layout.tier_bits[t] > 0; ++t) {
      QueryDigits q[R];
      Unroll<R>([&](auto r) { q[r] = DigitsAt(prepared[r], size_t(t) * per_tier, t); });
      Vec sum[R];
      ByteProducts<kDigits, true>(q, int(per_tier) / 4,
                                  keys.level + size_t(run) * run_bytes + 16 * size_t(t) * per_tier,
                                  sum);
      if (WideTier(layout, t)) {
        // The last digit's part of these would be 2^-24 of a score.
        Vec low[R];
        ByteProducts<kDigits - 1, false>(q, int(per_tier) / 4,
                                         keys.low + 16 * size_t(run) * per_tier, low);
        Unroll<R>([&](auto r) { sum[r] = sum[r] * 8.0f + low[r]; });
      }
      const Vec unit = Load(keys.unit[t] + 16 * run);
      Unroll<R>([&](auto r) { score[r] += sum[r] * unit; });
    }
    Unroll<R>([&](auto r) {
      Store(scratch.score + r * kTile + 16 * run, score[r] * prepared[r]->q_scale);
    });
  }
}

// Trellis-coded values of a tile as levels: [four tokens][piece][4][16 lanes][4 tokens]. Lane 4 l +
// i of vector k is channel 16 l + 4 k + i of the piece.
struct ValueBytes {
  alignas(64) int8_t level[kTile * kMaxHeadDim];
};

// Bytes of four tokens -> lane 4 l + i of x[k]: those of channel 16 l + 4 k + i.
[[gnu::always_inline]] inline void TurnTokens(__m512i (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]),
                c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
  x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
}

inline void UnpackValuePieces(const ValueLayout& layout, const PackedTile& tile, ValueBytes* out) {
  const int n_pieces = (layout.head_dim + 63) / 64;
  const __m512i levels = _mm512_load_si512(kCodes.level[TrellisBits(layout.number)]);
  EachPieceOfRuns(
      layout.planes, tile.rows, [&](int p, int run, const PieceOfRows& piece, auto together) {
        __m512i x[4];
        piece.EachRow<together()>(
            tile.value[run], layout.bytes, PrefetchShare(tile, run, 1, p, n_pieces),
            [&](auto i, __m512i codes) __attribute__((always_inline)) {
              x[i % 4] = _mm512_permutexvar_epi8(codes, levels);
              if constexpr (i % 4 == 3) {
                TurnTokens(x);
                int8_t* to =
                    out->level + (size_t(4 * run + i / 4) * size_t(n_pieces) + size_t(p)) * 256;
                Unroll<4>([&](auto k) { _mm512_store_si512(to + 64 * k, x[k]); });
              }
            });
      });
}

// Two codes lie in a byte: the second of another piece, or of four other tokens, which is as far
// behind.
template <int kRows, int kBits>
inline void UnpackJointValues(const PackedTile& tile, ValueBytes* out) {
  static constexpr ValueLayout layout =
      ValueLayout::Make(128 / kRows, sparkv_number(SPARKV_TRELLIS4 + 4 - kBits));
  static_assert(TrellisBits(layout.number) == kBits && JointValues::Fit(layout));
  static constexpr JointValues joint(layout);
  const __m512i levels = _mm512_load_si512(kCodes.level[TrellisBits(layout.number)]);
  for (int run = 0; run < kTile / 16; ++run) {
    if ((tile.rows >> (16 * run) & 0xffff) == 0) continue;
    const PrefetchShare next(tile, run, 1, 0, 1);
    int8_t* to = out->level + run * 16 * layout.head_dim;
    Unroll<4 / kRows>([&](auto g) __attribute__((always_inline)) {
      __m512i x[4];
      Unroll<4>([&](auto i) __attribute__((always_inline)) {
        constexpr int kRow = 4 * kRows * g + i;
        next.Row(kRow);
        if constexpr (kRows == 2) next.Row(kRow + 4);
        x[i] = joint.Codes<kRows, kBits == 1>(tile.value[run] + size_t(kRow) * layout.bytes,
                                              layout.bytes);
      });
      TurnTokens(x);
      Unroll<4>([&](auto k) __attribute__((always_inline)) {
        int8_t* at = to + 512 * g + 64 * k;
        _mm512_store_si512(at, _mm512_permutexvar_epi8(x[k], levels));
        _mm512_store_si512(
            at + 256,
            _mm512_permutexvar_epi8(_mm512_gf2p8affine_epi64_epi8(x[k], BitsFrom(4), 0), levels));
      });
    });
  }
}

void UnpackValues(const ValueLayout& layout, const PackedTile& tile, ValueBytes* out) {
  if (!JointValues::Fit(layout)) return UnpackValuePieces(layout, tile, out);
  const auto unpack = [&](auto bits) {
    return layout.head_dim == 128 ? UnpackJointValues<1, bits()>(tile, out)
                                  : UnpackJointValues<2, bits()>(tile, out);
  };
  if (layout.number == SPARKV_TRELLIS3) return unpack(std::integral_constant<int, 3>());
  if (layout.number == SPARKV_TRELLIS2) return unpack(std::integral_constant<int, 2>());
  unpack(std::integral_constant<int, 1>());
}

// 2^x for x <= 0, to 2e-7; below -126 zero. NaN stays NaN.
inline __m512 Exp2(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.8671300e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.0170300e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5799910e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4016445e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9315131e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, x);
}

// Lane r: of all lanes of x[r], by op.
template <int R, typename Op>
[[gnu::always_inline]] inline __m512 ReduceRows(const __m512 (&x)[R], Op&& op) {
  static_assert(R <= 4 || R == 16);
  // Lane 4 b + i: of block b of row `first` + i.
  const auto four = [&](int first) __attribute__((always_inline)) {
    const auto pair = [&](int a, int b) __attribute__((always_inline)) {
      const __m512 y = x[a < R ? a : R - 1], z = x[b < R ? b : R - 1];
      return _mm512_castps_pd(op(_mm512_unpacklo_ps(y, z), _mm512_unpackhi_ps(y, z)));
    };
    const __m512d low = pair(first, first + 1), high = pair(first + 2, first + 3);
    return op(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
              _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  };
  // Blocks 0 and 1, 2 and 3 of a, then of b, by op.
  const auto blocks = [&](__m512 a, __m512 b) __attribute__((always_inline)) {
    return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  if constexpr (R == 16) {
    return blocks(blocks(four(0), four(4)), blocks(four(8), four(12)));
  } else {
    const __m512 rows = blocks(four(0), four(0));
    return blocks(rows, rows);
  }
}
constexpr auto kLargest = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto kSum = [](auto a, auto b) { return a + b; };

// Scores [R][64] of query rows row .. row + n - 1 -> calls emit(r, weights e^(s - m) [4 vectors]),
// zeros for what a row does not see; emit may write over the scores of row r. correction [R]: what
// the sums so far have to be multiplied with. Returns whether a row is heavy: has a token with more
// than an eighth of d, the sum of all its weights so far.
template <int R, typename Emit>
[[gnu::always_inline]] inline bool RowWeights(const QueryBlock& block, int row, int n,
                                              const uint64_t* visible, const uint16_t* const* mask,
                                              float* score, const AttentionState& state,
                                              float* correction, Emit&& emit) {
  const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  alignas(64) float scale[16] = {};
  __m512 largest[R];
  int token = row / block.group, g = row % block.group;
  const auto multiply = [&](int r) {
    for (int t = 0; t < kTile; ++t) score[r * kTile + t] *= scale[r];
    scale[r] = 1.0f;
  };
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    largest[r] = hidden;
    if (r >= n) return;
    const uint64_t seen = visible[token];
    float* s = score + r * kTile;
    scale[r] = PlainScores(block, g, seen, mask != nullptr ? mask[token] : nullptr, s);
    // The largest would be another, or a hidden score no number.
    if (!(scale[r] > 0.0f)) multiply(r);
    if (seen != ~uint64_t{0}) {
      for (int k = 0; k < 4; ++k)
        _mm512_mask_storeu_ps(s + 16 * k, __mmask16(~seen >> (16 * k)), hidden);
    }
    // A score that is no number does not count.
    Unroll<4>([&](auto k) __attribute__((always_inline)) {
      largest[r] = _mm512_max_ps(_mm512_loadu_ps(s + 16 * k), largest[r]);
    });
    if (++g == block.group) g = 0, ++token;
  });
  const __mmask16 lanes = __mmask16((1u << n) - 1);
  const __m512 log2e = _mm512_set1_ps(1.44269504f), scales = _mm512_load_ps(scale);
  const __m512 tile_top = _mm512_mul_ps(ReduceRows(largest, kLargest), scales);
  const __m512 before = _mm512_maskz_loadu_ps(lanes, state.m + row);
  const __m512 top = _mm512_max_ps(tile_top, before);
  _mm512_mask_storeu_ps(state.m + row, lanes, top);
  // What scores are taken from: where nothing was seen yet zero, and no weight inf - inf.
  const __m512 from = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, hidden, _CMP_NEQ_UQ), top);
  alignas(64) float tops[16];
  _mm512_store_ps(tops, from);
  // What rounding took from the largest would count.
  if (_mm512_cmp_ps_mask(_mm512_abs_ps(from), _mm512_set1_ps(1e6f), _CMP_GT_OQ) != 0) [[unlikely]] {
    for (int r = 0; r < n; ++r) multiply(r);
  }
  const auto weight = [&](__m512 above) { return Exp2(_mm512_mul_ps(above, log2e)); };
  const __m512 change =
      _mm512_mask_mov_ps(weight(_mm512_sub_ps(before, from)),
                         _mm512_cmp_ps_mask(before, top, _CMP_EQ_OQ), _mm512_set1_ps(1.0f));
  _mm512_mask_storeu_ps(correction, lanes, change);
  __m512 sum[R];
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    sum[r] = _mm512_setzero_ps();
    if (r >= n) return;
    __m512 p[4];
    Unroll<4>([&](auto k) __attribute__((always_inline)) {
      p[k] = weight(_mm512_fmsub_ps(_mm512_loadu_ps(score + r * kTile + 16 * k),
                                    _mm512_set1_ps(scale[r]), _mm512_set1_ps(tops[r])));
      sum[r] = _mm512_add_ps(sum[r], p[k]);
    });
    emit(r, p);
  });
  const __m512 d =
      _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, state.d + row), change, ReduceRows(sum, kSum));
  _mm512_mask_storeu_ps(state.d + row, lanes, d);
  const __m512 heaviest = weight(_mm512_sub_ps(tile_top, from));
  return _mm512_mask_cmp_ps_mask(lanes, _mm512_mul_ps(heaviest, _mm512_set1_ps(8.0f)), d,
                                 _CMP_GT_OQ) != 0;
}

// For few rows: their weights are kept.
template <int R>
inline bool RowWeights(const QueryBlock& block, int row, const uint64_t* visible,
                       const uint16_t* const* mask, float* score, const AttentionState& state,
                       __m512 (&p)[R][4], float* correction) {
  return RowWeights<R>(
      block, row, R, visible, mask, score, state,
      correction, [&](auto r, const __m512(&x)[4]) __attribute__((always_inline)) {
        Unroll<4>([&](auto k) { p[r][k] = x[k]; });
      });
}

// Softmax weights of a row times the scales of the value rows: weight = factor * number, a number
// being kParts bytes, the highest first.
template <int kParts>
struct WeightBytes {
  // Of tokens 16 k + 4 i .. 16 k + 4 i + 3: word 4 i + k.
  alignas(64) uint8_t part[kParts][kTile];
  float factor, sum;  // sum of the numbers
  [[gnu::always_inline]] int32_t Word(int part_index, int k, int i) const {
    return reinterpret_cast<const int32_t*>(part[part_index])[4 * i + k];
  }
};

// p [R]: weights; d [R]: their sums so far. The sum of the numbers is made if `sums`.
template <int R, int kParts>
inline void SplitWeights(__m512 (&p)[R][4], const float* unit, const float* d, bool sums,
                         WeightBytes<kParts> (&w)[R]) {
  constexpr float kTop = kParts == 2 ? 65535.0f : 65535.0f * 256.0f;
  constexpr __mmask8 kLanes = (1 << R) - 1;
  __m512 largest[R];
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    largest[r] = _mm512_setzero_ps();
    Unroll<4>([&](auto k) __attribute__((always_inline)) {
      p[r][k] = _mm512_mul_ps(p[r][k], _mm512_load_ps(unit + 16 * k));
      largest[r] = _mm512_max_ps(largest[r], p[r][k]);
    });
  });
  const __m128 most = _mm512_castps512_ps128(ReduceRows(largest, kLargest));
  const __mmask8 any = _mm_cmp_ps_mask(most, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
  alignas(16) float factor[4], inverse[4];
  // A sum that is no number makes the factor none.
  const __m128 poison = _mm_mul_ps(_mm_maskz_loadu_ps(kLanes, d), _mm_setzero_ps());
  _mm_store_ps(factor, _mm_add_ps(_mm_maskz_mul_ps(any, most, _mm_set1_ps(1.0f / kTop)), poison));
  _mm_store_ps(inverse, _mm_maskz_div_ps(any, _mm_set1_ps(kTop), most));
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    __m512i n[4];
    Unroll<4>([&](auto k) __attribute__((always_inline)) {
      n[k] = _mm512_cvtps_epi32(_mm512_mul_ps(p[r][k], _mm512_set1_ps(inverse[r])));
    });
    w[r].factor = factor[r];
    if (sums) {
      w[r].sum = float(_mm512_reduce_add_epi32(
          _mm512_add_epi32(_mm512_add_epi32(n[0], n[1]), _mm512_add_epi32(n[2], n[3]))));
    }
    if constexpr (kParts == 3) {
      const auto third = [&](int k) { return _mm512_srli_epi32(n[k], 16); };
      _mm512_store_si512(w[r].part[0],
                         _mm512_packus_epi16(_mm512_packus_epi32(third(0), third(1)),
                                             _mm512_packus_epi32(third(2), third(3))));
      Unroll<4>([&](auto k) { n[k] = _mm512_and_si512(n[k], _mm512_set1_epi32(0xffff)); });
    }
    const __m512i x = _mm512_packus_epi32(n[0], n[1]), y = _mm512_packus_epi32(n[2], n[3]);
    const __m512i low = _mm512_set1_epi16(255);
    _mm512_store_si512(w[r].part[kParts - 2],
                       _mm512_packus_epi16(_mm512_srli_epi16(x, 8), _mm512_srli_epi16(y, 8)));
    _mm512_store_si512(w[r].part[kParts - 1],
                       _mm512_packus_epi16(_mm512_and_si512(x, low), _mm512_and_si512(y, low)));
  });
}

// Sums over tokens of the bytes of R rows' weights times values, for two vectors of channels.
template <int R, int kParts>
struct WeightedSums {
  __m512i sum[R][kParts][2];
  WeightedSums() {
    Unroll<R * kParts * 2>(
        [&](auto i) { sum[i / 2 / kParts][i / 2 % kParts][i % 2] = _mm512_setzero_si512(); });
  }
  // x, y: values of tokens 16 k + 4 i .. 16 k + 4 i + 3, a channel per lane.
  [[gnu::always_inline]] void Add(const WeightBytes<kParts>* weights, int k, int i, __m512i x,
                                  __m512i y) {
    Unroll<R * kParts>([&](auto j) __attribute__((always_inline)) {
      const __m512i w = _mm512_set1_epi32(weights[j / kParts].Word(j % kParts, k, i));
      __m512i(&to)[2] = sum[j / kParts][j % kParts];
      to[0] = AddProducts(to[0], w, x);
      to[1] = AddProducts(to[1], w, y);
    });
  }
  [[gnu::always_inline]] __m512 Number(int r, int i) const {
    const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sum[r][0][i], 8), sum[r][1][i]);
    if constexpr (kParts == 2) return _mm512_cvtepi32_ps(high);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f),
                           _mm512_cvtepi32_ps(sum[r][kParts - 1][i]));
  }
};

// o[r] = o[r] * correction[r] + sum_t weight_rt value_t for R rows, 32 channels at a time. Four
// tokens of a channel lie in a lane.
//   q4: level = (2 c - 15) / 15, q8: level = (2 (c - 128) + 1) / 255
template <int R, bool kBytes, int kParts>
inline void ByteValues(const ValueLayout& layout, const PackedTile& tile,
                       const WeightBytes<kParts>* weights, const float* correction, float* o,
                       size_t o_stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i each = _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101));
  // Byte i of tokens 0..3, which lie 16 (q4) or 32 (q8) bytes apart.
  const __m512i spread =
      _mm512_add_epi32(each, _mm512_set1_epi32(kBytes ? 0x60402000 : 0x30201000));
  const __m512i beyond = _mm512_add_epi32(spread, _mm512_set1_epi32(0x10101010));
  const __m512i nibble = _mm512_set1_epi8(15), centre = _mm512_set1_epi8(char(0x80));
  const size_t bytes = layout.bytes;
  for (int c = 0; c < layout.head_dim; c += 32) {
    WeightedSums<R, kParts> sums;
    const size_t at = layout.scale_bytes + size_t(kBytes ? c : c / 2);
    for (int g = 0; g < kTile / 4; ++g) {
      if ((tile.rows >> (4 * g) & 15) == 0) continue;
      const uint8_t* row = tile.value[g / 4] + size_t(g % 4 * 4) * bytes + at;
      __m512i even, odd;
      if constexpr (kBytes) {
        const auto half = [](const uint8_t* p) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        };
        const __m512i a =
            _mm512_inserti64x4(_mm512_castsi256_si512(half(row)), half(row + bytes), 1);
        const __m512i b = _mm512_inserti64x4(_mm512_castsi256_si512(half(row + 2 * bytes)),
                                             half(row + 3 * bytes), 1);
        even = _mm512_xor_si512(_mm512_permutex2var_epi8(a, spread, b), centre);
        odd = _mm512_xor_si512(_mm512_permutex2var_epi8(a, beyond, b), centre);
      } else {
        const auto quarter = [](const uint8_t* p) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        };
        __m512i four = _mm512_castsi128_si512(quarter(row));
        four = _mm512_mask_broadcast_i32x4(four, 0x00f0, quarter(row + bytes));
        four = _mm512_mask_broadcast_i32x4(four, 0x0f00, quarter(row + 2 * bytes));
        four = _mm512_mask_broadcast_i32x4(four, 0xf000, quarter(row + 3 * bytes));
        four = _mm512_permutexvar_epi8(spread, four);
        even = _mm512_and_si512(four, nibble);
        odd = _mm512_and_si512(_mm512_srli_epi16(four, 4), nibble);
      }
      sums.Add(weights, g / 4, g % 4, even, odd);
    }
    Unroll<R>([&](auto r) __attribute__((always_inline)) {
      const float step = weights[r].factor / (kBytes ? 255.0f : 15.0f);
      const __m512 scale = _mm512_set1_ps(2.0f * step),
                   offset = _mm512_set1_ps(weights[r].sum * step * (kBytes ? 1.0f : -15.0f));
      __m512 x = _mm512_fmadd_ps(sums.Number(r, 0), scale, offset),
             y = _mm512_fmadd_ps(sums.Number(r, 1), scale, offset);
      if constexpr (!kBytes) {
        // Even and odd channels take turns.
        const __m512i turns =
            _mm512_add_epi32(_mm512_srli_epi32(lane, 1),
                             _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(1)), 4));
        const __m512 evens = x;
        x = _mm512_permutex2var_ps(evens, turns, y);
        y = _mm512_permutex2var_ps(evens, _mm512_add_epi32(turns, _mm512_set1_epi32(8)), y);
      }
      float* to = o + size_t(r) * o_stride + c;
      Store(to, _mm512_fmadd_ps(Load(to), _mm512_set1_ps(correction[r]), x));
      if (size_t(c) + 16 < o_stride)
        Store(to + 16, _mm512_fmadd_ps(Load(to + 16), _mm512_set1_ps(correction[r]), y));
    });
  }
}

// The same with levels: value = unit level, the units in the weights.
template <int R, int kParts>
inline void ByteValues(const ValueLayout& layout, uint64_t rows, const ValueBytes& values,
                       const WeightBytes<kParts>* weights, const float* correction, float* o,
                       size_t o_stride) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const int n_pieces = (layout.head_dim + 63) / 64;
  for (int p = 0; p < n_pieces; ++p) {
    for (int half = 0; half < 2; ++half) {
      WeightedSums<R, kParts> sums;
      for (int g = 0; g < kTile / 4; ++g) {
        if ((rows >> (4 * g) & 15) == 0) continue;
        const int8_t* from =
            values.level + (size_t(g) * size_t(n_pieces) + size_t(p)) * 256 + 128 * half;
        sums.Add(weights, g / 4, g % 4, _mm512_load_si512(from), _mm512_load_si512(from + 64));
      }
      Unroll<R>([&](auto r) __attribute__((always_inline)) {
        const __m512 factor = _mm512_set1_ps(weights[r].factor);
        const __m512 x = _mm512_mul_ps(sums.Number(r, 0), factor),
                     y = _mm512_mul_ps(sums.Number(r, 1), factor);
        float* to = o + size_t(r) * o_stride + 64 * p + 8 * half;
        const __m256 scale = _mm256_set1_ps(correction[r]);
        const auto add = [&](int at, __m256 z) {
          if (64 * p + 8 * half + at < layout.head_dim)
            _mm256_storeu_ps(to + at, _mm256_fmadd_ps(_mm256_loadu_ps(to + at), scale, z));
        };
        const auto add_pair = [&](int at, __m512 z) {
          add(at, _mm512_castps512_ps256(z));
          add(at + 16, _mm512_extractf32x8_ps(z, 1));
        };
        add_pair(0, _mm512_permutex2var_ps(x, first, y));
        add_pair(32, _mm512_permutex2var_ps(x, second, y));
      });
    }
  }
}

// Values of a tile: levels of trellis-coded ones, numbers in the scratch of f16 ones, else the
// packed rows themselves.
struct TileValues {
  const ValueLayout& layout;
  const PackedTile& tile;
  const ValueBytes& levels;
  alignas(64) float unit[kTile];  // what weights are multiplied with first; not for f16
};

// The same for any rotated values. p [R]: softmax weights; d [R]: their sums so far. Where no row
// is heavy, 64 weights of two bytes, each off by 1 / 131070 of the largest at most, are together
// off by 6e-5 of d.
template <int R, int kParts>
inline void ByteValues(const TileValues& values, __m512 (&p)[R][4], const float* d,
                       const float* correction, float* o, size_t o_stride) {
  const ValueLayout& layout = values.layout;
  WeightBytes<kParts> weights[R];
  SplitWeights<R>(p, values.unit, d, !layout.trellis(), weights);
  if (layout.trellis()) {
    ByteValues<R>(layout, values.tile.rows, values.levels, weights, correction, o, o_stride);
  } else if (layout.number == SPARKV_INT8) {
    ByteValues<R, true>(layout, values.tile, weights, correction, o, o_stride);
  } else {
    ByteValues<R, false>(layout, values.tile, weights, correction, o, o_stride);
  }
}

// Rows row .. row + R - 1 of the block, keys unpacked: KeyBytes or TierBytes.
template <int R, typename Keys>
inline void ByteRows(const KeyLayout& key, const QueryBlock& block, int row, const Keys& keys,
                     const TileValues& values, const uint64_t* visible, const uint16_t* const* mask,
                     const Scratch& scratch, const AttentionState& state) {
  const uint64_t any = SeenBy(block, row, R, visible);
  if (any == 0) return;
  ByteScores<R>(key, row, keys, any, scratch);
  float correction[R];
  __m512 p[R][4];
  const bool heavy = RowWeights<R>(block, row, visible, mask, scratch.score, state, p, correction);
  float* o = state.o + size_t(row) * size_t(block.o_stride);
  const size_t o_stride = size_t(block.o_stride);
  if (!values.layout.rotated()) {
    Unroll<4 * R>([&](auto i) { _mm512_storeu_ps(scratch.score + 16 * i, p[i / 4][i % 4]); });
    const uint64_t rows = values.tile.rows;
    return ValueKernel<R>(scratch.score, correction, scratch.value, int(PadTo16(block.v_dim)),
                          std::countr_zero(rows), 64 - std::countl_zero(rows), o, block.o_stride);
  }
  const float* d = state.d + row;
  if (heavy) {
    ByteValues<R, 3>(values, p, d, correction, o, o_stride);
  } else {
    ByteValues<R, 2>(values, p, d, correction, o, o_stride);
  }
}

// Units of 16 value rows, whose first bytes are given; returns those that are not finite.
inline __mmask16 ValueUnits(const ValueLayout& layout, __m512i heads, float* unit) {
  __mmask16 nan;
  __m512 x;
  if (layout.trellis()) {
    const __m512i e = _mm512_and_si512(heads, _mm512_set1_epi32(255));
    nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(kValueGainNotFinite));
    x = _mm512_mul_ps(GridValues<4, 40>(e),
                      _mm512_set1_ps(kTrellisLevels[TrellisBits(layout.number)].inverse_top));
  } else {
    const __m512i e = _mm512_and_si512(heads, _mm512_set1_epi32(4095));
    nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(kValueScaleNotFinite));
    x = GridValues<64, 32>(e);
  }
  _mm512_store_ps(unit, _mm512_maskz_mov_ps(__mmask16(~nan), x));
  return nan;
}

// unpack_keys(keys): all keys of the tile.
template <typename Keys, typename UnpackKeys>
inline void AttendBytes(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                        const PackedTile& tile, const uint64_t* visible,
                        const uint16_t* const* mask, const Scratch& scratch,
                        const AttentionState& state, UnpackKeys&& unpack_keys) {
  Keys keys;
  ValueBytes levels;
  TileValues values{value, tile, levels, {}};
  const RowHeads heads(tile.value, value.bytes, value.rotated() ? tile.rows : 0);
  unpack_keys(&keys);
  for (int run = 0; run < 4; ++run) {
    const unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu;
    if (rows == 0) continue;
    if (!value.trellis()) PrefetchNext(tile, run, 1);
    // A value that is not finite gives no number: its key does, to those who see it.
    unsigned nan = 0;
    if (value.rotated()) {
      nan = ValueUnits(value, heads.Of(run, rows), values.unit + 16 * run);
    } else {
      for (unsigned left = rows; left != 0; left &= left - 1) {
        const int i = std::countr_zero(left);
        float* v = scratch.value + size_t(16 * run + i) * PadTo16(block.v_dim);
        if (ValueRow(value, tile.value[run] + size_t(i) * value.bytes, v)) continue;
        std::memset(v, 0, size_t(block.v_dim) * sizeof(float));
        nan |= 1u << i;
      }
    }
    _mm512_mask_store_ps(keys.FirstUnit() + 16 * run, __mmask16(nan),
                         _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  }
  if (value.trellis()) UnpackValues(value, tile, &levels);
  if (!value.rotated()) ClearHoles(tile.rows, scratch.value, PadTo16(block.v_dim));
  InParts<4>(block.n_rows, [&](int row, auto n) {
    ByteRows<n()>(key, block, row, keys, values, visible, mask, scratch, state);
  });
}

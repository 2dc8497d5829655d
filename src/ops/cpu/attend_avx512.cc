// AVX-512 with VBMI2. A 64-channel piece of a key is one mask register: kept codes are expanded under the mask, signs are
// deposited under its complement, and both meet in a blend.
#include <immintrin.h>

#include "ops/cpu/inl.h"

namespace sparkv::avx512 {
#include "ops/cpu/row-inl.h"

constexpr int kVec = 16;
constexpr int kColVecs = 4;

// 64 bits at bit `at` of bytes; may read 8 bytes beyond the last one needed (rows end before the region does).
inline uint64_t BitsAt(const uint8_t* bytes, unsigned at) {
  uint64_t word;
  std::memcpy(&word, bytes + at / 8, 8);
  const unsigned shift = at % 8;
  if (shift == 0) return word;
  return word >> shift | uint64_t(bytes[at / 8 + 8]) << (64 - shift);
}

inline uint64_t Word(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

bool HalfRow(const uint16_t* half, int n, float* out) {
  __m256i largest = _mm256_setzero_si256();
  for (int j = 0; j < n; j += 16) {
    const __mmask16 lanes = n - j >= 16 ? 0xffff : __mmask16((1u << (n - j)) - 1);
    const __m256i h = _mm256_maskz_loadu_epi16(lanes, half + j);
    largest = _mm256_max_epu16(largest, _mm256_and_si256(h, _mm256_set1_epi16(0x7fff)));
    _mm512_storeu_ps(out + j, _mm512_cvtph_ps(h));
  }
  return _mm256_cmpge_epu16_mask(largest, _mm256_set1_epi16(0x7c00)) == 0;
}

// 64 codes of kept channels, ranks first .. first + 63 (first a multiple of 64).
template <sparkv_number kNumber>
inline __m512i Codes64(const KeyLayout& layout, const uint8_t* row, unsigned first) {
  const uint8_t* low = row + layout.low_at;
  if constexpr (kNumber == SPARKV_INT8) return _mm512_loadu_si512(low + first);
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + first / 2)));
  const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  const uint8_t* high = row + layout.high_at;
  if constexpr (kNumber == SPARKV_INT5) {
    return _mm512_mask_add_epi8(nibbles, Word(high + first / 8), nibbles, _mm512_set1_epi8(16));
  } else if constexpr (kNumber == SPARKV_INT6) {
    const uint64_t a = Word(high + first / 4), b = Word(high + first / 4 + 8);
    const uint64_t even = 0x5555555555555555u;
    const __mmask64 bit4 = _pext_u64(a, even) | _pext_u64(b, even) << 32;
    const __mmask64 bit5 = _pext_u64(a, ~even) | _pext_u64(b, ~even) << 32;
    const __m512i with4 = _mm512_mask_add_epi8(nibbles, bit4, nibbles, _mm512_set1_epi8(16));
    return _mm512_mask_add_epi8(with4, bit5, with4, _mm512_set1_epi8(32));
  } else {
    return nibbles;
  }
}

// Levels of all codes, and scales of all scale codes: two loads instead of a dozen instructions per row. Made by the compiler:
// nothing of this file may run on a machine that lacks its instructions.
template <int kCodes>
struct LevelTable {
  alignas(64) float level[kCodes] = {};
  constexpr LevelTable() {
    for (int i = 0; i < kCodes; ++i) level[i] = Level(i, float(kCodes / 2) - 0.5f);
  }
};
struct ScaleTable {
  float largest[1024] = {}, ratio[64] = {};
  constexpr ScaleTable() {
    for (int e = 0; e < 1023; ++e) largest[e] = KeyScaleGrid::Value(e);
    largest[kKeyScaleNotFinite] = std::numeric_limits<float>::quiet_NaN();
    for (int r = 0; r < 64; ++r) ratio[r] = RatioValue(r);
  }
};
constexpr LevelTable<16> kLevels4;
constexpr LevelTable<32> kLevels5;
constexpr ScaleTable kScales;

// Calls emit(j, x) with the channels j .. j + 15 of a key, for every such piece. kDim: the head size where it is worth a
// compile-time constant, else 0.
template <sparkv_number kNumber, int kDim, typename Emit>
[[gnu::always_inline]] inline void IntegerKey(const KeyLayout& layout, const float* table, const uint8_t* row, Emit&& emit) {
  const int n = kDim != 0 ? kDim : layout.head_dim;
  constexpr int kBits = kNumber == SPARKV_INT8 ? 8 : kNumber == SPARKV_INT6 ? 6 : kNumber == SPARKV_INT5 ? 5 : 4;
  constexpr float kMiddle = float(1 << (kBits - 1)) - 0.5f;
  const float* restore = table;
  const uint32_t scale = GetScale(row);
  const float top = kScales.largest[KeyScaleOf(scale)];
  const float ratio = kScales.ratio[RatioOf(scale)];
  const float magnitude = ratio == 0.0f ? 0.0f : top * ratio;
  const __m512 to_unit = _mm512_set1_ps(1.0f / kMiddle), minus_one = _mm512_set1_ps(-1.0f);
  const __m512 linear = _mm512_set1_ps(kLevelLinear * top), square = _mm512_set1_ps((1.0f - kLevelLinear) * top);
  const __m512 tops = _mm512_set1_ps(top);
  __m512 low_levels = tops, high_levels = tops;
  if constexpr (kNumber == SPARKV_INT5) {
    low_levels = _mm512_mul_ps(tops, _mm512_load_ps(kLevels5.level));
    high_levels = _mm512_mul_ps(tops, _mm512_load_ps(kLevels5.level + 16));
  } else if constexpr (kNumber == SPARKV_INT4) {
    low_levels = _mm512_mul_ps(tops, _mm512_load_ps(kLevels4.level));
  }
  const __m512 plus = _mm512_set1_ps(magnitude), minus = _mm512_set1_ps(-magnitude);
  // All codes first, as bytes, when they do not fit one register: a 64-channel piece starts at any rank.
  alignas(64) uint8_t codes[kMaxHeadDim + 64];
  const bool one = n <= 64;
  if (!one) {
    for (int first = 0; first < layout.kept; first += 64) {
      _mm512_store_si512(codes + first, Codes64<kNumber>(layout, row, unsigned(first)));
    }
  }
  unsigned rank = 0, pruned_rank = 0;
  for (int j0 = 0; j0 < n; j0 += 64) {
    const uint64_t channels = n - j0 >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - j0)) - 1;
    const uint64_t mask = layout.mask_bytes != 0 ? Word(row + layout.mask_at + j0 / 8) & channels
                          : layout.kept > 0      ? channels
                                                 : 0;
    const __m512i packed = one ? Codes64<kNumber>(layout, row, 0) : _mm512_loadu_si512(codes + rank);
    const __m512i expanded = _mm512_maskz_expand_epi8(mask, packed);
    const uint64_t positive =
        layout.sign_bytes != 0 ? _pdep_u64(BitsAt(row + layout.sign_at, pruned_rank), ~mask & channels) : 0;
    const auto quarter = [&](int i, __m128i bytes) __attribute__((always_inline)) {
      const __mmask16 kept = __mmask16(mask >> (16 * i)), plus_bits = __mmask16(positive >> (16 * i));
      const int j = j0 + 16 * i;
      const __m512i code = _mm512_cvtepu8_epi32(bytes);
      __m512 x;
      if constexpr (kNumber == SPARKV_INT5) {
        x = _mm512_permutex2var_ps(low_levels, code, high_levels);
      } else if constexpr (kNumber == SPARKV_INT4) {
        x = _mm512_permutexvar_ps(code, low_levels);
      } else {
        const __m512 unit = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), to_unit, minus_one);
        x = _mm512_mul_ps(unit, _mm512_fmadd_ps(_mm512_abs_ps(unit), square, linear));
      }
      // Masked loads keep off the weights when nothing is pruned and there are none.
      const __m512 sign_magnitude = _mm512_mask_blend_ps(plus_bits, minus, plus);
      const __m512 pruned = _mm512_mul_ps(sign_magnitude, _mm512_maskz_loadu_ps(__mmask16(~kept), restore + j));
      emit(j, _mm512_mask_mov_ps(pruned, kept, x));
    };
    quarter(0, _mm512_castsi512_si128(expanded));
    if (n - j0 >= 64) {
      quarter(1, _mm512_extracti32x4_epi32(expanded, 1));
      quarter(2, _mm512_extracti32x4_epi32(expanded, 2));
      quarter(3, _mm512_extracti32x4_epi32(expanded, 3));
    } else {
      if (n - j0 > 16) quarter(1, _mm512_extracti32x4_epi32(expanded, 1));
      if (n - j0 > 32) quarter(2, _mm512_extracti32x4_epi32(expanded, 2));
      if (n - j0 > 48) quarter(3, _mm512_extracti32x4_epi32(expanded, 3));
    }
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

template <typename Emit>
[[gnu::always_inline]] inline void HalfKey(const KeyLayout& layout, const float* table, const uint8_t* row, Emit&& emit) {
  const int n = layout.head_dim;
  const uint8_t* codes = row + layout.low_at;
  if (layout.pruned == 0) {
    for (int j = 0; j < n; j += 16) {
      const __mmask16 lanes = n - j >= 16 ? 0xffff : 0xff;
      emit(j, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, codes + 2 * j)));
    }
    return;
  }
  const float magnitude = PrunedMagnitude(layout, row);
  const __m512 plus = _mm512_set1_ps(magnitude), minus = _mm512_set1_ps(-magnitude);
  unsigned rank = 0, pruned_rank = 0;
  for (int j0 = 0; j0 < n; j0 += 32) {
    const uint32_t channels = n - j0 >= 32 ? ~0u : (1u << (n - j0)) - 1;
    uint32_t mask = 0;
    if (layout.mask_bytes != 0) std::memcpy(&mask, row + layout.mask_at + j0 / 8, 4);
    mask &= channels;
    const __m512i expanded = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(codes + 2 * rank));
    const uint32_t positive =
        layout.sign_bytes != 0 ? uint32_t(_pdep_u32(uint32_t(BitsAt(row + layout.sign_at, pruned_rank)), ~mask & channels))
                               : 0;
    const auto half = [&](int i, __m256i bits) {
      const __m512 pruned = _mm512_mul_ps(_mm512_mask_blend_ps(__mmask16(positive >> (16 * i)), minus, plus),
                                          _mm512_loadu_ps(table + j0 + 16 * i));
      emit(j0 + 16 * i, _mm512_mask_mov_ps(pruned, __mmask16(mask >> (16 * i)), _mm512_cvtph_ps(bits)));
    };
    half(0, _mm512_castsi512_si256(expanded));
    if (n - j0 > 16) half(1, _mm512_extracti64x4_epi64(expanded, 1));
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

template <sparkv_number kNumber, int kDim, typename Emit>
[[gnu::always_inline]] inline void KeyPieces(const KeyLayout& layout, const float* table, const uint8_t* row, Emit&& emit) {
  if constexpr (kNumber == SPARKV_F16) {
    HalfKey(layout, table, row, emit);
  } else {
    IntegerKey<kNumber, kDim>(layout, table, row, emit);
  }
}

// Calls body(constant) with the number type as a compile-time constant.
template <typename Body>
inline void WithNumber(sparkv_number number, Body&& body) {
  switch (number) {
    case SPARKV_F16: return body(std::integral_constant<sparkv_number, SPARKV_F16>());
    case SPARKV_INT8: return body(std::integral_constant<sparkv_number, SPARKV_INT8>());
    case SPARKV_INT6: return body(std::integral_constant<sparkv_number, SPARKV_INT6>());
    case SPARKV_INT5: return body(std::integral_constant<sparkv_number, SPARKV_INT5>());
    case SPARKV_INT4: return body(std::integral_constant<sparkv_number, SPARKV_INT4>());
  }
}

inline void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  WithNumber(layout.number, [&](auto number) {
    KeyPieces<number(), 0>(layout, table, row, [&](int j, __m512 x) { _mm512_storeu_ps(out + j, x); });
  });
}

inline bool ValueRow(const ValueLayout& layout, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  const uint8_t* code = row + layout.scale_bytes;
  if (layout.number == SPARKV_F16) return HalfRow(reinterpret_cast<const uint16_t*>(row), n, out);
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const float top = ValueScaleGrid::Value(e);
  if (layout.number == SPARKV_INT8) {
    const __m512 step = _mm512_set1_ps(top * (1.0f / 127.5f)), offset = _mm512_set1_ps(-top);
    for (int j = 0; j < n; j += 16) {
      const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + j)));
      _mm512_storeu_ps(out + j, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), step, offset));
    }
    return true;
  }
  // Nibbles look their level up in one register.
  const __m512 levels = _mm512_mul_ps(_mm512_setr_ps(-1.0f, -13 / 15.0f, -11 / 15.0f, -9 / 15.0f, -7 / 15.0f, -5 / 15.0f,
                                                     -3 / 15.0f, -1 / 15.0f, 1 / 15.0f, 3 / 15.0f, 5 / 15.0f, 7 / 15.0f,
                                                     9 / 15.0f, 11 / 15.0f, 13 / 15.0f, 1.0f),
                                      _mm512_set1_ps(top));
  for (int j = 0; j < n; j += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + j / 2));
    const __m128i pairs = _mm_cvtepu8_epi16(bytes);
    const __m128i nibbles = _mm_or_si128(pairs, _mm_slli_epi16(pairs, 4));
    _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(nibbles), levels));
  }
  return true;
}

// 64 value codes as levels in [-1, 1], sixteen at a time: calls emit(i, levels) for i = 0..3. The scale of the row is left to
// the weight the row is summed with.
template <typename Emit>
inline void ValueLevels(bool bytes, const uint8_t* code, Emit&& emit) {
  if (bytes) {
    const __m512 step = _mm512_set1_ps(1.0f / 127.5f), minus_one = _mm512_set1_ps(-1.0f);
    for (int i = 0; i < 4; ++i) {
      const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + 16 * i)));
      emit(i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), step, minus_one));
    }
    return;
  }
  const __m512 levels = _mm512_setr_ps(-1.0f, -13 / 15.0f, -11 / 15.0f, -9 / 15.0f, -7 / 15.0f, -5 / 15.0f, -3 / 15.0f,
                                       -1 / 15.0f, 1 / 15.0f, 3 / 15.0f, 5 / 15.0f, 7 / 15.0f, 9 / 15.0f, 11 / 15.0f,
                                       13 / 15.0f, 1.0f);
  // permutexvar looks at the low four bits of a lane alone, so the even nibble needs no mask.
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
  const __m512i nibbles = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
  emit(0, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(nibbles)), levels));
  emit(1, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(nibbles, 1)), levels));
  emit(2, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(nibbles, 2)), levels));
  emit(3, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(nibbles, 3)), levels));
}

#include "ops/cpu/attend-inl.h"

// sum[l] = sum of the lanes of v[l], by halves: after the step of 2^b, bit b of the lane is bit b of the row.
inline Vec SumLanes(Vec (&v)[16]) {
  const auto halve = [&]<int kStep>(std::integral_constant<int, kStep>) {
    for (int i = 0; i < 16; i += 2 * kStep) {
      SwapBlocks<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kVec>());
      v[i] += v[i + kStep];
    }
  };
  halve(std::integral_constant<int, 1>());
  halve(std::integral_constant<int, 2>());
  halve(std::integral_constant<int, 4>());
  halve(std::integral_constant<int, 8>());
  return v[0];
}

// The tile for a handful of query rows, one token being decoded: rows go from packed bytes into sums without a stop in memory.
// Scores: a row's pieces meet the queries in registers, lanes are added up for 16 rows together. Values: 64 channels of all
// query rows stay in registers while the rows of the tile pass.
template <int R, sparkv_number kNumber, int kDim>
void AttendFew(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block, const PackedTile& tile,
               const uint64_t* visible, const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state) {
  const size_t q_stride = kDim != 0 ? size_t(kDim) : block.q_stride;
  alignas(64) float top[kTile];
  float* score = scratch.score;
  for (int t0 = 0; t0 < kTile; t0 += 16) {
    const unsigned rows = unsigned(tile.rows >> t0) & 0xffffu;
    if (rows == 0) continue;
    Vec sum[R][16];
    for (int i = 0; i < 16; ++i) {
      Vec acc[R] = {};
      top[t0 + i] = 0.0f;
      if ((rows >> i & 1) != 0) {
        const int t = t0 + i;
        KeyPieces<kNumber, kDim>(key, tile.table[t], tile.key[t], [&](int j, __m512 x) __attribute__((always_inline)) {
          for (int r = 0; r < R; ++r) acc[r] = _mm512_fmadd_ps(x, _mm512_loadu_ps(block.q + size_t(r) * q_stride + j), acc[r]);
        });
        const int e = int(GetScale(tile.value[t]));
        if (e == kValueScaleNotFinite) {
          for (int r = 0; r < R; ++r) acc[r] = Set(std::numeric_limits<float>::quiet_NaN());
        } else {
          top[t] = ValueScaleGrid::Value(e);
        }
      }
      for (int r = 0; r < R; ++r) sum[r][i] = acc[r];
    }
    for (int r = 0; r < R; ++r) Store(score + r * kTile + t0, SumLanes(sum[r]));
  }

  const int first_row = std::countr_zero(tile.rows), end_row = 64 - std::countl_zero(tile.rows);
  float correction[R];
  for (int r = 0; r < R; ++r) {
    const int token = r / block.group;
    float* weight = score + r * kTile;
    correction[r] = 1.0f;
    if (visible[token] == 0) {
      std::memset(weight, 0, kTile * sizeof(float));
      continue;
    }
    correction[r] = Softmax(block, r % block.group, visible[token], mask != nullptr ? mask[token] : nullptr, weight,
                            &state.m[r], &state.d[r]);
    for (int t = first_row & ~15; t < end_row; t += kVec) Store(weight + t, Load(weight + t) * Load(top + t));
  }
  const bool bytes = value.number == SPARKV_INT8;
  for (int c = 0; c < value.head_dim; c += 64) {
    Vec acc[R][4];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) acc[r][i] = Load(state.o + size_t(r) * size_t(block.o_stride) + c + 16 * i) * correction[r];
    }
    const size_t at = value.scale_bytes + size_t(bytes ? c : c / 2);
    for (uint64_t rows = tile.rows; rows != 0; rows &= rows - 1) {
      const int t = std::countr_zero(rows);
      ValueLevels(bytes, tile.value[t] + at, [&](int i, __m512 x) {
        for (int r = 0; r < R; ++r) acc[r][i] = _mm512_fmadd_ps(x, _mm512_set1_ps(score[r * kTile + t]), acc[r][i]);
      });
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) Store(state.o + size_t(r) * size_t(block.o_stride) + c + 16 * i, acc[r][i]);
    }
  }
}

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block, const PackedTile& tile,
                      const uint64_t* visible, const uint16_t* const* mask, const Scratch& scratch,
                      const AttentionState& state) {
  if (block.n_rows <= 4 && value.rotated() && key.head_dim % 16 == 0 && value.head_dim % 64 == 0) {
    const auto few = [&](auto number, auto dim) {
      switch (block.n_rows) {
        case 1: return AttendFew<1, number(), dim()>(key, value, block, tile, visible, mask, scratch, state);
        case 2: return AttendFew<2, number(), dim()>(key, value, block, tile, visible, mask, scratch, state);
        case 3: return AttendFew<3, number(), dim()>(key, value, block, tile, visible, mask, scratch, state);
        default: return AttendFew<4, number(), dim()>(key, value, block, tile, visible, mask, scratch, state);
      }
    };
    return WithNumber(key.number, [&](auto number) {
      // One piece of 64 channels, no loop: the size of small models.
      if (key.head_dim == 64 && block.q_stride == 64) return few(number, std::integral_constant<int, 64>());
      few(number, std::integral_constant<int, 0>());
    });
  }
  AttendPacked(key, value, block, tile, visible, mask, scratch, state);
}
}  // namespace sparkv::avx512

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

template <sparkv_number kNumber>
inline void IntegerKeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  constexpr int kBits = kNumber == SPARKV_INT8 ? 8 : kNumber == SPARKV_INT6 ? 6 : kNumber == SPARKV_INT5 ? 5 : 4;
  constexpr float kMiddle = float(1 << (kBits - 1)) - 0.5f;
  // Masked loads keep off the weights when nothing is pruned and there are none.
  const float* restore = table;
  const float top = LargestKept(row);
  const float magnitude = layout.restores() ? PrunedMagnitude(layout, row) : 0.0f;
  const __m512 to_unit = _mm512_set1_ps(1.0f / kMiddle), minus_one = _mm512_set1_ps(-1.0f);
  const __m512 linear = _mm512_set1_ps(kLevelLinear * top), square = _mm512_set1_ps((1.0f - kLevelLinear) * top);
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
    const int quarters = n - j0 >= 64 ? 4 : (n - j0 + 15) / 16;
    const auto quarter = [&](int i, __m128i bytes) {
      const __mmask16 kept = __mmask16(mask >> (16 * i)), plus_bits = __mmask16(positive >> (16 * i));
      const int j = j0 + 16 * i;
      const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), to_unit, minus_one);
      const __m512 slope = _mm512_fmadd_ps(_mm512_abs_ps(x), square, linear);
      const __m512 z = _mm512_mask_mov_ps(_mm512_mask_blend_ps(plus_bits, minus, plus), kept, x);
      const __m512 unit = _mm512_mask_loadu_ps(slope, __mmask16(~kept), restore + j);
      _mm512_storeu_ps(out + j, _mm512_mul_ps(z, unit));
    };
    quarter(0, _mm512_castsi512_si128(expanded));
    if (quarters > 1) quarter(1, _mm512_extracti32x4_epi32(expanded, 1));
    if (quarters > 2) quarter(2, _mm512_extracti32x4_epi32(expanded, 2));
    if (quarters > 3) quarter(3, _mm512_extracti32x4_epi32(expanded, 3));
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

inline void HalfKeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  const uint8_t* codes = row + layout.low_at;
  if (layout.pruned == 0) {
    for (int j = 0; j < n; j += 8) {
      _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 2 * j))));
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
      _mm512_storeu_ps(out + j0 + 16 * i,
                       _mm512_mask_mov_ps(pruned, __mmask16(mask >> (16 * i)), _mm512_cvtph_ps(bits)));
    };
    half(0, _mm512_castsi512_si256(expanded));
    if (n - j0 > 16) half(1, _mm512_extracti64x4_epi64(expanded, 1));
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

inline void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  switch (layout.number) {
    case SPARKV_INT8: return IntegerKeyRow<SPARKV_INT8>(layout, table, row, out);
    case SPARKV_INT6: return IntegerKeyRow<SPARKV_INT6>(layout, table, row, out);
    case SPARKV_INT5: return IntegerKeyRow<SPARKV_INT5>(layout, table, row, out);
    case SPARKV_INT4: return IntegerKeyRow<SPARKV_INT4>(layout, table, row, out);
    case SPARKV_F16: return HalfKeyRow(layout, table, row, out);
  }
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

#include "ops/cpu/attend-inl.h"
}  // namespace sparkv::avx512

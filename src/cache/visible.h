// Rows of bits: which cells a query sees.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sparkv {

// Calls body(index) for every set bit of words [n_words], in ascending order.
template <typename Body>
void ForEachBit(const uint64_t* words, size_t n_words, Body&& body) {
  for (size_t w = 0; w < n_words; ++w) {
    for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1)
      body(int64_t(w * 64) + std::countr_zero(bits));
  }
}

// Calls body(row, index) for every bit of `left` [n_words] that a row of bits [n_rows][n_words]
// has, at the first such row. Those bits of left are cleared.
template <typename Body>
void ForEachFirst(const uint64_t* bits, int64_t n_rows, size_t n_words, uint64_t* left,
                  Body&& body) {
  for (int64_t row = 0; row < n_rows; ++row, bits += n_words) {
    for (size_t w = 0; w < n_words; ++w) {
      const uint64_t first = bits[w] & left[w];
      left[w] ^= first;
      ForEachBit(&first, 1, [&](int64_t i) { body(row, int64_t(w * 64) + i); });
    }
  }
}

inline bool HasBit(const uint64_t* words, int64_t i) {
  return (words[i / 64] >> (i % 64) & 1) != 0;
}

inline void SetBits(uint64_t* words, int64_t n) {
  for (int64_t w = 0; w < n / 64; ++w) words[w] = ~uint64_t{0};
  if (n % 64 != 0) words[n / 64] = (uint64_t{1} << (n % 64)) - 1;
}

// Bit i of words = mask[i] is not -inf (f16). words is zero before. True when some visible entry is
// not zero.
inline bool VisibleBits(const uint16_t* mask, int64_t n, uint64_t* words) {
  constexpr uint16_t kHidden = 0xfc00u;
  bool values = false;
  int64_t i = 0;
#if defined(__SSE2__)
  const __m128i hidden = _mm_set1_epi16(short(kHidden)), magnitude = _mm_set1_epi16(0x7fff);
  __m128i any = _mm_setzero_si128();
  for (; i + 16 <= n; i += 16) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i + 8));
    const __m128i hide_a = _mm_cmpeq_epi16(a, hidden), hide_b = _mm_cmpeq_epi16(b, hidden);
    any = _mm_or_si128(
        any, _mm_and_si128(_mm_or_si128(_mm_andnot_si128(hide_a, a), _mm_andnot_si128(hide_b, b)),
                           magnitude));
    const unsigned bits = unsigned(_mm_movemask_epi8(_mm_packs_epi16(hide_a, hide_b))) ^ 0xffffu;
    words[i / 64] |= uint64_t(bits) << (i % 64);
  }
  values = _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) != 0xffff;
#endif
  for (; i < n; ++i) {
    if (mask[i] == kHidden) continue;
    words[i / 64] |= uint64_t{1} << (i % 64);
    values |= (mask[i] & 0x7fffu) != 0;
  }
  return values;
}

}  // namespace sparkv

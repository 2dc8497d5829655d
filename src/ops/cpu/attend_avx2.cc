// AVX2 with F16C, FMA and BMI2. Eight channels at a time: a byte of the mask picks the shuffle that spreads the kept codes.
#include <immintrin.h>

#include <array>

#include "ops/cpu/inl.h"

namespace sparkv::avx2 {
#include "ops/cpu/row-inl.h"

constexpr int kVec = 8;
constexpr int kColVecs = 2;

// For each mask byte, the source rank of each channel, 0x80 (zero) where the channel is pruned.
constexpr std::array<std::array<uint8_t, 8>, 256> MakeSpread() {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (unsigned m = 0; m < 256; ++m) {
    uint8_t rank = 0;
    for (unsigned j = 0; j < 8; ++j) table[m][j] = (m >> j & 1) != 0 ? rank++ : uint8_t(0x80);
  }
  return table;
}
constexpr auto kSpread = MakeSpread();

inline __m256i LaneBits() { return _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); }
// All bits of lane j set where bit j of `bits` is.
inline __m256 Lanes(unsigned bits) {
  const __m256i b = _mm256_and_si256(_mm256_set1_epi32(int(bits)), LaneBits());
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, LaneBits()));
}

inline unsigned Bits8At(const uint8_t* bytes, unsigned at) {
  return (unsigned(bytes[at / 8]) | unsigned(bytes[at / 8 + 1]) << 8) >> (at % 8) & 255u;
}

bool HalfRow(const uint16_t* half, int n, float* out) {
  __m128i largest = _mm_setzero_si128();
  for (int j = 0; j < n; j += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + j));
    largest = _mm_max_epu16(largest, _mm_and_si128(h, _mm_set1_epi16(0x7fff)));
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(h));
  }
  const __m128i inf = _mm_set1_epi16(0x7c00);
  return _mm_movemask_epi8(_mm_cmpeq_epi16(_mm_max_epu16(largest, inf), largest)) == 0;
}

// Codes of all kept channels as bytes.
inline void CodeBytes(const KeyLayout& layout, const uint8_t* row, uint8_t* codes) {
  const uint8_t* low = row + layout.low_at;
  const uint8_t* high = row + layout.high_at;
  if (layout.number == SPARKV_INT8) {
    std::memcpy(codes, low, size_t(layout.kept));
    return;
  }
  for (int first = 0; first < layout.kept; first += 32) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + first / 2)));
    __m256i x = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    if (layout.number == SPARKV_INT5) {
      uint32_t bits;
      std::memcpy(&bits, high + first / 8, 4);
      for (int i = 0; i < 4; ++i) {
        const uint64_t eight = _pdep_u64(bits >> (8 * i) & 255u, 0x1010101010101010u);
        std::memcpy(codes + first + 8 * i, &eight, 8);
      }
      x = _mm256_or_si256(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + first)));
    } else if (layout.number == SPARKV_INT6) {
      uint64_t bits;
      std::memcpy(&bits, high + first / 4, 8);
      for (int i = 0; i < 4; ++i) {
        const uint64_t eight = _pdep_u64(bits >> (16 * i) & 65535u, 0x3030303030303030u);
        std::memcpy(codes + first + 8 * i, &eight, 8);
      }
      x = _mm256_or_si256(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + first)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), x);
  }
}

inline void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  const uint8_t* halves = row + layout.low_at;
  if (layout.pruned == 0 && layout.number == SPARKV_F16) {
    for (int j = 0; j < n; j += 8) {
      _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * j))));
    }
    return;
  }
  const bool integers = layout.number != SPARKV_F16;
  alignas(32) uint8_t codes[kMaxHeadDim + 64];
  const float middle = Middle(layout), top = integers ? LargestKept(row) : 0.0f;
  if (integers) CodeBytes(layout, row, codes);
  const KeyWeights w(table, n);
  const float magnitude = PrunedMagnitude(layout, row);
  const __m256 to_unit = _mm256_set1_ps(1.0f / middle), minus_one = _mm256_set1_ps(-1.0f);
  const __m256 linear = _mm256_set1_ps(kLevelLinear * top), square = _mm256_set1_ps((1.0f - kLevelLinear) * top);
  const __m256 magnitude_bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 plus = _mm256_set1_ps(magnitude), minus = _mm256_set1_ps(-magnitude);
  unsigned rank = 0, pruned_rank = 0;
  for (int j = 0; j < n; j += 8) {
    const unsigned mask = layout.mask_bytes != 0 ? row[layout.mask_at + unsigned(j) / 8] : layout.kept > 0 ? 255u : 0u;
    const unsigned positive =
        layout.sign_bytes != 0 ? _pdep_u32(Bits8At(row + layout.sign_at, pruned_rank), ~mask & 255u) : 0u;
    __m256 pruned = _mm256_setzero_ps();
    if (layout.pruned > 0) {
      pruned = _mm256_mul_ps(_mm256_blendv_ps(minus, plus, Lanes(positive)), _mm256_loadu_ps(w.restore + j));
    }
    __m256 kept;
    if (integers) {
      const __m128i bytes = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + rank)),
                                             _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread[mask].data())));
      const __m256 x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), to_unit, minus_one);
      kept = _mm256_mul_ps(x, _mm256_fmadd_ps(_mm256_and_ps(x, magnitude_bits), square, linear));
    } else {
      // Byte pairs of the half at rank r are 2r and 2r + 1.
      const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread[mask].data()));
      const __m128i twice = _mm_add_epi8(ranks, _mm_and_si128(ranks, _mm_set1_epi8(0x7f)));
      const __m128i pairs = _mm_unpacklo_epi8(twice, _mm_add_epi8(twice, _mm_set1_epi8(1)));
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * rank));
      kept = _mm256_cvtph_ps(_mm_shuffle_epi8(h, pairs));
    }
    _mm256_storeu_ps(out + j, _mm256_blendv_ps(pruned, kept, Lanes(mask)));
    const unsigned kept_here = unsigned(std::popcount(mask));
    rank += kept_here;
    pruned_rank += 8 - kept_here;
  }
}

inline bool ValueRow(const ValueLayout& layout, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  const uint8_t* code = row + layout.scale_bytes;
  if (layout.number == SPARKV_F16) return HalfRow(reinterpret_cast<const uint16_t*>(row), n, out);
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const float top = ValueScaleGrid::Value(e);
  const bool bytes = layout.number == SPARKV_INT8;
  const __m256 step = _mm256_set1_ps(top * (bytes ? 1.0f / 127.5f : 1.0f / 7.5f)), offset = _mm256_set1_ps(-top);
  for (int j = 0; j < n; j += 8) {
    __m256i x;
    if (bytes) {
      x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + j)));
    } else {
      uint32_t word;
      std::memcpy(&word, code + j / 2, 4);
      x = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(_pdep_u64(word, 0x0f0f0f0f0f0f0f0fu))));
    }
    _mm256_storeu_ps(out + j, _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), step, offset));
  }
  return true;
}

#include "ops/cpu/attend-inl.h"

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block, const PackedTile& tile,
                      const uint64_t* visible, const uint16_t* const* mask, const Scratch& scratch,
                      const AttentionState& state) {
  AttendPacked(key, value, block, tile, visible, mask, scratch, state);
}
}  // namespace sparkv::avx2

// AVX2 with F16C, FMA and BMI2. Eight channels at a time: a byte of the mask picks the shuffle that
// spreads the kept codes.
#include <immintrin.h>

#include "ops/cpu/inl.h"

namespace sparkv::avx2 {
#include "ops/cpu/row-inl.h"
#include "ops/cpu/spread-inl.h"
#include "ops/cpu/trellis-inl.h"

constexpr int kVec = 8;
constexpr int kColVecs = 2;

inline __m256i LaneBits() { return _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); }
// All bits of lane j set where bit j of `bits` is.
inline __m256 Lanes(unsigned bits) {
  const __m256i b = _mm256_and_si256(_mm256_set1_epi32(int(bits)), LaneBits());
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, LaneBits()));
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

// Bytes of ones where a bit of `bits` is kSet, zeros elsewhere.
template <bool kSet>
inline __m256i ByteMask(uint32_t bits) {
  const __m256i place =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201u));
  const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), place), bit);
  return _mm256_cmpeq_epi8(b, kSet ? bit : _mm256_setzero_si256());
}

// Levels of all kept channels as signed bytes.
inline void LevelBytes(const KeyLayout& layout, const uint8_t* row, uint8_t* codes) {
  const uint8_t* low = row + layout.low_at;
  const uint8_t* high = row + layout.high_at;
  if (layout.number == SPARKV_INT8) {
    for (int first = 0; first < layout.kept; first += 32) {
      // -127 .. -1 below zero, 1 .. 127 above.
      const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + first));
      const __m256i centred = _mm256_xor_si256(code, _mm256_set1_epi8(char(0x80)));
      const __m256i above = _mm256_cmpgt_epi8(centred, _mm256_set1_epi8(-1));
      const __m256i level =
          _mm256_max_epi8(_mm256_subs_epi8(centred, above), _mm256_set1_epi8(-127));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), level);
    }
    return;
  }
  // Sixteen levels per register; the high bits of a code choose the register.
  const int8_t* table = LevelsOf(layout.number).level;
  const auto levels = [&](int first) {
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + first)));
  };
  const __m256i levels0 = levels(0), levels1 = levels(16), levels2 = levels(32),
                levels3 = levels(48);
  for (int first = 0; first < layout.kept; first += 32) {
    const __m256i pairs =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + first / 2)));
    const __m256i low_codes =
        _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    __m256i x = _mm256_shuffle_epi8(levels0, low_codes);
    if (layout.number == SPARKV_INT5) {
      uint32_t bits;
      std::memcpy(&bits, high + first / 8, 4);
      const __m256i bit4 = ByteMask<true>(bits);
      x = _mm256_blendv_epi8(x, _mm256_shuffle_epi8(levels1, low_codes), bit4);
    } else if (layout.number == SPARKV_INT6) {
      uint64_t bits;
      std::memcpy(&bits, high + first / 4, 8);
      for (int i = 0; i < 4; ++i) {
        const uint64_t eight = _pdep_u64(bits >> (16 * i) & 65535u, 0xc0c0c0c0c0c0c0c0u);
        std::memcpy(codes + first + 8 * i, &eight, 8);
      }
      const __m256i bit5 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + first));
      const __m256i bit4 = _mm256_add_epi8(bit5, bit5);
      x = _mm256_blendv_epi8(_mm256_blendv_epi8(x, _mm256_shuffle_epi8(levels1, low_codes), bit4),
                             _mm256_blendv_epi8(_mm256_shuffle_epi8(levels2, low_codes),
                                                _mm256_shuffle_epi8(levels3, low_codes), bit4),
                             bit5);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), x);
  }
}

#include "ops/cpu/trellis_avx2-inl.h"

// TrellisNumbers, 16 numbers of one run at a time, else one by one.
inline void TrellisFloats(const TrellisRuns& runs, const uint8_t* row, const float* unit,
                          float* out) {
  if (runs.per_run % 16 != 0) return TrellisNumbers(runs, row, unit, out);
  const int n = runs.planes->numbers[0];
  for (int i = n; i < runs.n(); ++i) out[i] = 0.0f * unit[i / runs.per_run];
  for (int first = 0; first < n; first += 64) {
    const Piece piece(runs, first);
    __m256i codes[2];
    WithPlanes(piece.n_planes, [&](auto planes) { piece.Codes<planes()>(row, codes); });
    alignas(32) uint8_t code[64];
    alignas(32) int8_t level[64];
    for (int h = 0; h < 2; ++h) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(code + 32 * h), codes[h]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(level + 32 * h), piece.Levels(h, codes[h]));
    }
    for (int i = 0; i < 64 && first + i < n; i += 8) {
      const int bits = piece.bits[i / 16];
      const __m256 x =
          bits > kByteBits
              ? WideLevels(bits, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + i)))
              : Floats8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(level + i)));
      _mm256_storeu_ps(out + first + i,
                       _mm256_mul_ps(x, _mm256_set1_ps(unit[(first + i) / runs.per_run])));
    }
  }
}

inline void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  if (layout.tiered()) return TierRow(layout, row, out, TrellisFloats);
  const int n = layout.head_dim;
  const uint8_t* halves = row + layout.low_at;
  if (layout.pruned == 0 && layout.number == SPARKV_F16) {
    for (int j = 0; j < n; j += 8) {
      _mm256_storeu_ps(
          out + j,
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * j))));
    }
    return;
  }
  const bool integers = layout.number != SPARKV_F16;
  alignas(32) uint8_t codes[kMaxHeadDim + 64];
  const __m256 unit = _mm256_set1_ps(integers ? LargestKept(row) * kLevelUnit : 0.0f);
  if (integers) LevelBytes(layout, row, codes);
  const KeyWeights w(table, n);
  const float magnitude = PrunedMagnitude(layout, row);
  const __m256 plus = _mm256_set1_ps(magnitude), minus = _mm256_set1_ps(-magnitude);
  unsigned rank = 0, pruned_rank = 0;
  for (int j = 0; j < n; j += 8) {
    const unsigned mask = MaskByte(layout, row, j);
    const unsigned positive =
        layout.sign_bytes != 0 ? _pdep_u32(Bits8At(row + layout.sign_at, pruned_rank), ~mask & 255u)
                               : 0u;
    __m256 pruned = _mm256_setzero_ps();
    if (layout.pruned > 0) {
      pruned = _mm256_mul_ps(_mm256_blendv_ps(minus, plus, Lanes(positive)),
                             _mm256_loadu_ps(w.restore + j));
    }
    __m256 kept;
    if (integers) {
      const __m128i bytes =
          _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + rank)),
                           _mm_loadl_epi64(reinterpret_cast<const __m128i*>(Spread(mask))));
      kept = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), unit);
    } else {
      // Byte pairs of the half at rank r are 2r and 2r + 1.
      const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(Spread(mask)));
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
  if (layout.trellis()) return TrellisValue(layout, row, out, TrellisFloats);
  const int n = layout.head_dim;
  const uint8_t* code = row + layout.scale_bytes;
  if (layout.number == SPARKV_F16) return HalfRow(reinterpret_cast<const uint16_t*>(row), n, out);
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const float top = ValueScaleGrid::Value(e);
  const bool bytes = layout.number == SPARKV_INT8;
  const __m256 step = _mm256_set1_ps(top * (bytes ? 1.0f / 127.5f : 1.0f / 7.5f)),
               offset = _mm256_set1_ps(-top);
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

#include "ops/cpu/attend_few_avx2-inl.h"

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                      const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
                      const Scratch& scratch, const AttentionState& state) {
  if (block.n_rows <= kFewRows) {
    if (key.number != SPARKV_F16 && value.rotated() && (!key.tiered() || key.per_tier() % 16 == 0))
      return AttendFew(key, value, block, tile, visible, mask, scratch, state);
    if (key.number == SPARKV_F16 && key.pruned == 0 && !value.rotated()) {
      HalfRows in;
      in.rows = tile.rows;
      for (uint64_t rows = tile.rows; rows != 0; rows &= rows - 1) {
        const int t = std::countr_zero(rows);
        in.key[t] = tile.key[t / 16] + size_t(t % 16) * key.bytes;
        in.value[t] = tile.value[t / 16] + size_t(t % 16) * value.bytes;
      }
      return AttendFewHalf(block, in, visible, mask, scratch, state);
    }
  }
  AttendPacked(key, value, block, tile, visible, mask, scratch, state);
}

void AttendDense(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                 const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state) {
  if (block.n_rows > kFewRows) return AttendDenseRows(block, tile, visible, mask, scratch, state);
  HalfRows in;
  in.rows = tile.rows;
  for (uint64_t rows = tile.rows; rows != 0; rows &= rows - 1) {
    const int t = std::countr_zero(rows);
    in.key[t] = reinterpret_cast<const uint8_t*>(tile.key[t]);
    in.value[t] = reinterpret_cast<const uint8_t*>(tile.value[t]);
  }
  AttendFewHalf(block, in, visible, mask, scratch, state);
}

void PrepareQueries(const KeyLayout& layout, const float* table, const QueryBlock& block,
                    const Scratch& scratch) {
  if (layout.tiered()) PrepareTiers(layout, table, block, scratch);
}
}  // namespace sparkv::avx2

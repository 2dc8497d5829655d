// AVX-512 with VBMI2. A 64-channel piece of a key is one mask register: kept codes are expanded
// under the mask, signs are deposited under its complement, and both meet in a blend.
#include <immintrin.h>

#include "ops/cpu/inl.h"

namespace sparkv::avx512 {
#include "ops/cpu/row-inl.h"
#include "ops/cpu/trellis-inl.h"

constexpr int kVec = 16;
constexpr int kColVecs = 4;

// 64 bits at bit `at` of bytes; may read 8 bytes beyond the last one needed (rows end before the
// region does).
inline uint64_t BitsAt(const uint8_t* bytes, unsigned at) {
  uint64_t word;
  std::memcpy(&word, bytes + at / 8, 8);
  const unsigned shift = at % 8;
  if (shift == 0) return word;
  return word >> shift | uint64_t(bytes[at / 8 + 8]) << (64 - shift);
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

// Levels of 64 kept channels as signed bytes, ranks first .. first + 63 (first a multiple of 64).
template <sparkv_number kNumber>
inline __m512i Levels64(const KeyLayout& layout, const uint8_t* row, unsigned first) {
  const uint8_t* low = row + layout.low_at;
  if constexpr (kNumber == SPARKV_INT8) {
    // -127 .. -1 below zero, 1 .. 127 above.
    const __m512i centred =
        _mm512_xor_si512(_mm512_loadu_si512(low + first), _mm512_set1_epi8(char(0x80)));
    const __m512i one =
        _mm512_maskz_set1_epi8(_mm512_cmpgt_epi8_mask(centred, _mm512_set1_epi8(-1)), 1);
    return _mm512_max_epi8(_mm512_adds_epi8(centred, one), _mm512_set1_epi8(-127));
  }
  const __m512i pairs =
      _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + first / 2)));
  const __m512i nibbles =
      _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  const uint8_t* high = row + layout.high_at;
  __m512i codes = nibbles;
  if constexpr (kNumber == SPARKV_INT5) {
    codes = _mm512_mask_add_epi8(nibbles, Word(high + first / 8), nibbles, _mm512_set1_epi8(16));
  } else if constexpr (kNumber == SPARKV_INT6) {
    const uint64_t a = Word(high + first / 4), b = Word(high + first / 4 + 8);
    const uint64_t even = 0x5555555555555555u;
    const __mmask64 bit4 = _pext_u64(a, even) | _pext_u64(b, even) << 32;
    const __mmask64 bit5 = _pext_u64(a, ~even) | _pext_u64(b, ~even) << 32;
    const __m512i with4 = _mm512_mask_add_epi8(nibbles, bit4, nibbles, _mm512_set1_epi8(16));
    codes = _mm512_mask_add_epi8(with4, bit5, with4, _mm512_set1_epi8(32));
  }
  return _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(LevelsOf(kNumber).level));
}

// A key with integer kept channels, 64 channels at a time: calls emit(first channel, mask of kept
// ones, their levels in place and `other` elsewhere, bits of positive pruned ones).
template <sparkv_number kNumber, typename Emit>
[[gnu::always_inline]] inline void KeyPieces(const KeyLayout& layout, const uint8_t* row,
                                             __m512i other, Emit&& emit) {
  const int n = layout.head_dim;
  // All levels first when they do not fit one register: a piece starts at any rank.
  alignas(64) uint8_t levels[kMaxHeadDim + 64];
  const bool one = n <= 64;
  for (int first = 0; !one && first < layout.kept; first += 64) {
    _mm512_store_si512(levels + first, Levels64<kNumber>(layout, row, unsigned(first)));
  }
  unsigned rank = 0, pruned_rank = 0;
  for (int j = 0; j < n; j += 64) {
    const uint64_t channels = n - j >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - j)) - 1;
    const uint64_t mask = layout.mask_bytes != 0 ? Word(row + layout.mask_at + j / 8) & channels
                          : layout.kept > 0      ? channels
                                                 : 0;
    const __m512i packed =
        one ? Levels64<kNumber>(layout, row, 0) : _mm512_loadu_si512(levels + rank);
    const uint64_t positive =
        layout.sign_bytes != 0
            ? _pdep_u64(BitsAt(row + layout.sign_at, pruned_rank), ~mask & channels)
            : 0;
    emit(j, mask, _mm512_mask_expand_epi8(other, mask, packed), positive);
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

template <sparkv_number kNumber>
inline void IntegerKey(const KeyLayout& layout, const float* restore, const uint8_t* row,
                       float* out) {
  const __m512 unit = _mm512_set1_ps(LargestKept(row) * kLevelUnit);
  const float magnitude = PrunedMagnitude(layout, row);
  const __m512 plus = _mm512_set1_ps(magnitude), minus = _mm512_set1_ps(-magnitude);
  KeyPieces<kNumber>(
      layout, row, _mm512_setzero_si512(),
      [&](int j0, uint64_t mask, __m512i levels, uint64_t positive) {
        const int n = layout.head_dim - j0;
        const uint64_t other = ~mask & (n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1);
        const auto quarter = [&](int i, __m128i bytes) {
          const __mmask16 kept = __mmask16(mask >> (16 * i)),
                          sign = __mmask16(positive >> (16 * i));
          const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), unit);
          // Keys of which nothing is pruned have no weights.
          const __m512 pruned = _mm512_mul_ps(
              _mm512_mask_blend_ps(sign, minus, plus),
              restore == nullptr
                  ? _mm512_setzero_ps()
                  : _mm512_maskz_loadu_ps(__mmask16(other >> (16 * i)), restore + j0 + 16 * i));
          _mm512_storeu_ps(out + j0 + 16 * i, _mm512_mask_mov_ps(pruned, kept, x));
        };
        quarter(0, _mm512_castsi512_si128(levels));
        if (n > 16) quarter(1, _mm512_extracti32x4_epi32(levels, 1));
        if (n > 32) quarter(2, _mm512_extracti32x4_epi32(levels, 2));
        if (n > 48) quarter(3, _mm512_extracti32x4_epi32(levels, 3));
      });
}

inline void HalfKey(const KeyLayout& layout, const float* restore, const uint8_t* row, float* out) {
  const int n = layout.head_dim;
  const uint8_t* codes = row + layout.low_at;
  if (layout.pruned == 0) {
    for (int j = 0; j < n; j += 16) {
      const __mmask16 lanes = n - j >= 16 ? 0xffff : 0xff;
      _mm512_storeu_ps(out + j, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, codes + 2 * j)));
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
        layout.sign_bytes != 0
            ? uint32_t(
                  _pdep_u32(uint32_t(BitsAt(row + layout.sign_at, pruned_rank)), ~mask & channels))
            : 0;
    const auto half = [&](int i, __m256i bits) {
      const __m512 pruned =
          _mm512_mul_ps(_mm512_mask_blend_ps(__mmask16(positive >> (16 * i)), minus, plus),
                        _mm512_loadu_ps(restore + j0 + 16 * i));
      _mm512_storeu_ps(out + j0 + 16 * i, _mm512_mask_mov_ps(pruned, __mmask16(mask >> (16 * i)),
                                                             _mm512_cvtph_ps(bits)));
    };
    half(0, _mm512_castsi512_si256(expanded));
    if (n - j0 > 16) half(1, _mm512_extracti64x4_epi64(expanded, 1));
    const unsigned kept = unsigned(std::popcount(mask));
    rank += kept;
    pruned_rank += unsigned(std::popcount(channels)) - kept;
  }
}

// Levels of values by code: at most four bits, 32 codes, two registers to look up in.
constexpr int kValueBits = 4;
struct LevelTable {
  alignas(64) float level[kValueBits + 1][32] = {};
  constexpr LevelTable() {
    for (int bits = 0; bits <= kValueBits; ++bits) {
      for (int code = 0; code < 2 << bits; ++code)
        level[bits][code] = float(kTrellisLevels[bits].level[code]);
    }
  }
};
constexpr LevelTable kLevelTable;

// Where the codes of 64 trellis-coded numbers lie in a row, numbers first .. first + 63: a plane is
// a mask, a code the sum of the bits under it. Behind a plane's last number a bit counts for
// nothing; behind the last number of all, codes are anything.
struct PiecePlanes {
  int n_planes = 0;
  bool later;  // not the first: the path goes on
  uint32_t at[kMaxPlanes];
  PiecePlanes(const PlaneLayout& planes, int first) : later(first > 0) {
    for (; n_planes < planes.n_planes && planes.numbers[n_planes] > first; ++n_planes)
      at[n_planes] = planes.at[n_planes] + unsigned(first) / 8;
  }
};

// Reads them row by row.
struct Piece : PiecePlanes {
  __m512i bit[kMaxPlanes];
  Piece(const PlaneLayout& planes, int first) : PiecePlanes(planes, first) {
    for (int p = 0; p < n_planes; ++p) {
      const int n = planes.numbers[p] - first;
      const __mmask64 lanes = n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
      bit[p] = _mm512_maskz_set1_epi8(lanes, char(2 << p));
    }
  }

  template <int kPlanes>
  __m512i Codes(const uint8_t* row) const {
    const uint8_t* path = row + at[0];
    const PathPlanes c(Word(path), later ? Word(path - 8) : 0);
    __m512i code = _mm512_maskz_set1_epi8(c.c0, 1);
    code = _mm512_mask_add_epi8(code, c.c1, code, _mm512_set1_epi8(2));
    for (int p = 1; p < kPlanes; ++p)
      code = _mm512_mask_add_epi8(code, Word(row + at[p]), code, bit[p]);
    return code;
  }
};

// TrellisNumbers for values, whose numbers share one unit.
inline void ValueFloats(const TrellisRuns& runs, const uint8_t* row, const float* unit,
                        float* out) {
  if (runs.n() % 16 != 0) return TrellisNumbers(runs, row, unit, out);
  const float* level = kLevelTable.level[runs.bits[0]];
  const __m512 low = _mm512_load_ps(level), high = _mm512_load_ps(level + 16);
  for (int first = 0; first < runs.n(); first += 64) {
    const Piece piece(*runs.planes, first);
    alignas(64) uint8_t codes[64];
    WithPlanes<kValueBits>(piece.n_planes, [&](auto planes) {
      _mm512_store_si512(codes, piece.Codes<planes()>(row));
    });
    for (int i = first; i < first + 64 && i < runs.n(); i += 16) {
      const __m512i sixteen =
          _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + i - first)));
      _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutex2var_ps(low, sixteen, high),
                                              _mm512_set1_ps(*unit)));
    }
  }
}

inline void KeyRow(const KeyLayout& layout, const float* table, const uint8_t* row, float* out) {
  // Tiers that bytes can hold do not come here.
  if (layout.tiered()) return TierRow(layout, row, out, TrellisNumbers);
  if (layout.number == SPARKV_F16) return HalfKey(layout, table, row, out);
  WithInteger(layout.number, [&](auto number) { IntegerKey<number()>(layout, table, row, out); });
}

inline bool ValueRow(const ValueLayout& layout, const uint8_t* row, float* out) {
  if (layout.trellis()) return TrellisValue(layout, row, out, ValueFloats);
  const int n = layout.head_dim;
  const uint8_t* code = row + layout.scale_bytes;
  if (layout.number == SPARKV_F16) return HalfRow(reinterpret_cast<const uint16_t*>(row), n, out);
  const int e = int(GetScale(row));
  if (e == kValueScaleNotFinite) return false;
  const float top = ValueScaleGrid::Value(e);
  if (layout.number == SPARKV_INT8) {
    const __m512 step = _mm512_set1_ps(top * (1.0f / 127.5f)), offset = _mm512_set1_ps(-top);
    for (int j = 0; j < n; j += 16) {
      const __m512i x =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + j)));
      _mm512_storeu_ps(out + j, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), step, offset));
    }
    return true;
  }
  // Nibbles look their level up in one register.
  const __m512 levels =
      _mm512_mul_ps(_mm512_setr_ps(-1.0f, -13 / 15.0f, -11 / 15.0f, -9 / 15.0f, -7 / 15.0f,
                                   -5 / 15.0f, -3 / 15.0f, -1 / 15.0f, 1 / 15.0f, 3 / 15.0f,
                                   5 / 15.0f, 7 / 15.0f, 9 / 15.0f, 11 / 15.0f, 13 / 15.0f, 1.0f),
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

#include "ops/cpu/attend_bytes_avx512-inl.h"

#include "ops/cpu/attend_halves_avx512-inl.h"

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                      const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
                      const Scratch& scratch, const AttentionState& state) {
  if (key.number == SPARKV_F16 && key.pruned == 0 && value.number == SPARKV_F16 &&
      block.n_rows <= kFewHalves)
    return AttendPackedHalves(key, value, block, tile, visible, mask, scratch, state);
  if (key.number == SPARKV_F16 || (key.tiered() && !TiersByBytes(key)))
    return AttendPacked(key, value, block, tile, visible, mask, scratch, state);
  if (key.tiered()) {
    return AttendBytes<TierBytes>(
        key, value, block, tile, visible, mask, scratch, state,
        [&](TierBytes* keys) { UnpackKeys(key, PlacedKeys(scratch), tile, keys); });
  }
  WithInteger(key.number, [&](auto number) {
    AttendBytes<KeyBytes>(key, value, block, tile, visible, mask, scratch, state,
                          [&](KeyBytes* keys) {
                            const RowHeads heads(tile.key, key.bytes, tile.rows);
                            for (int run = 0; run < kTile / 16; ++run) {
                              const unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu;
                              if (rows == 0) continue;
                              PrefetchNext(tile, run, 0);
                              UnpackRun<number()>(key, tile.key[run], rows, heads, run, keys);
                            }
                          });
  });
}

void AttendDense(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                 const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state) {
  if (block.n_rows > kFewHalves) return AttendDenseRows(block, tile, visible, mask, scratch, state);
  AttendHalves(block, tile, visible, mask, scratch, state, [](int, int) {});
}

#include "ops/cpu/amx-inl.h"

#include "ops/cpu/attend_matrices_amx-inl.h"
}  // namespace sparkv::avx512

namespace sparkv::amx {
void PrepareQueries(const KeyLayout& layout, const float* table, const QueryBlock& block,
                    const Scratch& scratch) {
  if (block.n_rows < avx512::kMatrixRows)
    return avx512::PrepareQueries(layout, table, block, scratch);
  avx512::PrepareMatrixQueries(layout, table, block, scratch);
}

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                      const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
                      const Scratch& scratch, const AttentionState& state) {
  const auto attend =
      block.n_rows < avx512::kMatrixRows ? avx512::AttendPackedTile : avx512::AttendMatrices;
  attend(key, value, block, tile, visible, mask, scratch, state);
}

void AttendDense(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                 const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state) {
  const auto attend =
      block.n_rows < avx512::kMatrixRows ? avx512::AttendDense : avx512::AttendDenseMatrices;
  attend(block, tile, visible, mask, scratch, state);
}
}  // namespace sparkv::amx

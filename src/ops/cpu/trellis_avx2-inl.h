// AVX2: codes of trellis-coded numbers out of their planes, 64 at a time. Included inside
// attend_avx2.cc.

// Levels of up to 5 bits fit a byte: their magnitudes from the middle outwards.
constexpr int kByteBits = 5;
struct Magnitudes {
  alignas(16) int8_t of[kByteBits + 1][32] = {};
  constexpr Magnitudes() {
    for (int bits = 1; bits <= kByteBits; ++bits) {
      for (int i = 0; i < 1 << bits; ++i) of[bits][i] = int8_t(TrellisMagnitude(bits, i));
    }
  }
};
constexpr Magnitudes kMagnitudes;
alignas(32) constexpr int8_t kLaneNumbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Where the codes of 64 trellis-coded numbers lie in a row, numbers first .. first + 63, and what
// levels they mean, by 32. Behind the last number codes are anything.
struct Piece {
  int n_planes = 0, half_planes = 0;  // planes that reach number 0, number 32 of the piece
  bool later = false;                 // not the first: the path goes on
  uint32_t at[kMaxPlanes];
  __m256i bit[kMaxPlanes][2];  // what a bit of a plane adds to a code
  int bits[4] = {};            // of 16 numbers each; those above kByteBits are no bytes
  bool five[2] = {};           // whether some have five bits
  __m256i middle[2], flip[2], small[2], large[2];

  Piece() = default;
  Piece(const TrellisRuns& runs, int first) : later(first > 0) {
    const PlaneLayout& planes = *runs.planes;
    for (int p = 0; p < planes.n_planes && planes.numbers[p] > first; ++p, ++n_planes) {
      const int n = planes.numbers[p] - first;
      half_planes += n > 32;
      at[p] = planes.at[p] + unsigned(first) / 8;
      const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneNumbers));
      for (int h = 0; h < 2; ++h) {
        const __m256i end = _mm256_set1_epi8(char(std::clamp(n - 32 * h, 0, 32)));
        bit[p][h] = _mm256_and_si256(_mm256_cmpgt_epi8(end, lane), _mm256_set1_epi8(char(2 << p)));
      }
    }
    __m128i m[4], f[4], table[4][2];
    for (int c = 0; c < 4; ++c) {
      const int i = first + 16 * c;
      bits[c] = i < runs.n() ? runs.bits[i / runs.per_run] : 0;
      const int in_byte = bits[c] <= kByteBits ? bits[c] : 0;
      m[c] = _mm_set1_epi8(char(1 << in_byte));
      f[c] = _mm_set1_epi8(char((2 << in_byte) - 1));
      five[c / 2] |= bits[c] == kByteBits;
      const auto* from = reinterpret_cast<const __m128i*>(kMagnitudes.of[in_byte]);
      for (int half = 0; half < 2; ++half) table[c][half] = _mm_load_si128(from + half);
    }
    for (int h = 0; h < 2; ++h) {
      middle[h] = _mm256_set_m128i(m[2 * h + 1], m[2 * h]);
      flip[h] = _mm256_set_m128i(f[2 * h + 1], f[2 * h]);
      small[h] = _mm256_set_m128i(table[2 * h + 1][0], table[2 * h][0]);
      large[h] = _mm256_set_m128i(table[2 * h + 1][1], table[2 * h][1]);
    }
  }

  // Codes of numbers 32 h .. 32 h + 31.
  template <int kPlanes>
  [[gnu::always_inline]] void Codes(const uint8_t* row, __m256i (&codes)[2]) const {
    const uint64_t place = 0x0101010101010101u;
    const __m256i places[2] = {
        _mm256_setr_epi64x(0, int64_t(place), int64_t(2 * place), int64_t(3 * place)),
        _mm256_setr_epi64x(int64_t(4 * place), int64_t(5 * place), int64_t(6 * place),
                           int64_t(7 * place))};
    const __m256i select = _mm256_set1_epi64x(int64_t(0x8040201008040201u));
    const auto set = [&](uint64_t plane, int h) {
      return _mm256_cmpeq_epi8(
          _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(plane)), places[h]),
                           select),
          select);
    };
    const uint8_t* path = row + at[0];
    const PathPlanes c(Word(path), later ? Word(path - 8) : 0);
    for (int h = 0; h < 2; ++h) {
      codes[h] = _mm256_or_si256(_mm256_and_si256(set(c.c0, h), _mm256_set1_epi8(1)),
                                 _mm256_and_si256(set(c.c1, h), _mm256_set1_epi8(2)));
    }
    for (int p = 1; p < kPlanes; ++p) {
      const uint64_t plane = Word(row + at[p]);
      codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(set(plane, 0), bit[p][0]));
      if (p < half_planes)
        codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(set(plane, 1), bit[p][1]));
    }
  }

  [[gnu::always_inline]] __m256i Levels(int h, __m256i code) const {
    const __m256i negative = _mm256_cmpgt_epi8(middle[h], code);
    // code - middle at or above it, middle - 1 - code below.
    const __m256i place =
        _mm256_xor_si256(_mm256_xor_si256(code, middle[h]), _mm256_and_si256(negative, flip[h]));
    __m256i size = _mm256_shuffle_epi8(small[h], place);
    if (five[h]) {
      size = _mm256_blendv_epi8(size, _mm256_shuffle_epi8(large[h], place),
                                _mm256_cmpgt_epi8(place, _mm256_set1_epi8(15)));
    }
    return _mm256_sub_epi8(_mm256_xor_si256(size, negative), negative);
  }
};

inline __m256 WideLevels(int bits, __m128i eight_codes) {
  const LevelFormula& level = kLevelFormulas[bits];
  const __m256 y = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_codes)),
                                 _mm256_set1_ps(level.centre));
  const __m256 sign = _mm256_and_ps(y, _mm256_set1_ps(-0.0f));
  const __m256 size = _mm256_xor_ps(y, sign);
  const __m256 curve =
      _mm256_fmadd_ps(size, _mm256_set1_ps(level.square), _mm256_set1_ps(level.linear));
  return _mm256_or_ps(_mm256_floor_ps(_mm256_fmadd_ps(size, curve, _mm256_set1_ps(0.5f))), sign);
}

inline __m256 Floats8(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

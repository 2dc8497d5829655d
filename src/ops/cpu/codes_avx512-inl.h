// AVX-512: codes of trellis-coded rows as bytes. Included inside attend_bytes_avx512-inl.h.

// A piece's share of what is read next, a line with every row or every other one: a burst of lines
// waits for those before it, and the piece with it. The last share ends with what loads of 64 bytes
// touch behind the last row.
struct PrefetchShare {
  const uint8_t *at, *end;
  size_t step;  // bytes a row, at most a line
  // half: 0 with keys, 1 with values, of which each has n_pieces.
  PrefetchShare(const PackedTile& tile, int run, int half, int piece, int n_pieces)
      : at(tile.key[run]), end(at), step(tile.next_bytes / size_t(32 * n_pieces)) {
    if (step == 0) return;
    at = tile.next[run] + step * size_t(16 * (half * n_pieces + piece));
    end = half == 1 && piece == n_pieces - 1 ? tile.next[run] + tile.next_bytes + 31 : at;
  }
  [[gnu::always_inline]] void Row(int i) const {
    if (i % 2 == 0 || step > 32) __builtin_prefetch(at + size_t(i) * step, 0, 2);
    if (i == 15) __builtin_prefetch(end, 0, 2);
  }
};

// No line is touched for bytes that are not wanted, as a vector's load under a mask does.
inline __m128i EightBytes(const uint8_t* at) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
}

// Bits of a code lie in planes, so eight codes are a matrix of bits, eight bytes, to be transposed:
//   matrix byte 7 - b = bit b of eight codes;  byte i of the product with 1 << i = code i
// from: the bytes of `bits` that eight matrices have, where `present`.
[[gnu::always_inline]] inline __m512i CodesOf(__m512i bits, uint64_t present, __m512i from) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(int64_t(0x8040201008040201u)),
                                       _mm512_maskz_permutexvar_epi8(present, from, bits), 0);
}

// The codes of 64 trellis-coded numbers, first .. first + 63, of 16 rows. Bits 0 and 1 follow from
// the path: words 0 and 1 of a row's vector, before its other planes.
struct PieceOfRows {
  const PiecePlanes piece;
  bool together;  // one load has all planes of a row: they are within 56 bytes, the path in 8
  uint64_t bytes = 0, present = 0;
  __m512i from;  // matrix bytes in a row's vector
  PieceOfRows(const PlaneLayout& planes, int first) : piece(planes, first) {
    const auto low_bytes = [](unsigned n) {
      return n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
    };
    const int last = piece.n_planes - 1;
    const auto groups = [&](int p) {
      return unsigned(std::min(64, planes.numbers[p] - first) + 7) / 8;
    };
    const unsigned span = piece.at[last] + groups(last) - piece.at[0];
    together = span <= 56 && (last == 0 || piece.at[1] - piece.at[0] >= 8);
    bytes = together ? (((uint64_t{1} << span) - 1) << 8) : 0;
    uint64_t start = 0x0008ull << 48;  // of eight codes: byte 7 path bit 0, byte 6 bit 1
    present = 0xc0c0c0c0c0c0c0c0u & low_bytes(groups(0));
    for (int p = 1; p <= last; ++p) {
      const unsigned at = together ? 8 + piece.at[p] - piece.at[0] : unsigned(8 * (p + 1));
      start |= uint64_t(at) << (8 * (6 - p));
      present |= 0x0101010101010101u << (6 - p) & low_bytes(groups(p));
    }
    from =
        _mm512_add_epi8(_mm512_set_epi64(0x0707070707070707, 0x0606060606060606, 0x0505050505050505,
                                         0x0404040404040404, 0x0303030303030303, 0x0202020202020202,
                                         0x0101010101010101, 0),
                        _mm512_set1_epi64(int64_t(start)));
  }

  // Word 1 is the path, others are behind it.
  template <bool kTogether>
  [[gnu::always_inline]] __m512i Planes(const uint8_t* path) const {
    if constexpr (kTogether) return _mm512_maskz_loadu_epi8(bytes, path - 8);
    __m512i word = _mm512_setzero_si512();
    for (int p = 0; p < piece.n_planes; ++p) {
      word = _mm512_mask_broadcastq_epi64(word, __mmask8(2 << p),
                                          EightBytes(path - piece.at[0] + piece.at[p]));
    }
    return word;
  }

  // Calls body(i, codes of row i) for 16 rows, i a constant.
  template <bool kTogether, typename Body>
  [[gnu::always_inline]] void EachRow(const uint8_t* rows16, size_t row_bytes,
                                      const PrefetchShare& next, Body&& body) const {
    const __m512i shift = _mm512_setr_epi64(1, 2, 0, 0, 0, 0, 0, 0);
    static constexpr uint8_t kNoBits[8] = {};
    const uint8_t* path = rows16 + piece.at[0];
    const uint8_t* before = piece.later ? path - 8 : kNoBits;
    const size_t before_step = piece.later ? row_bytes : 0;
    const auto all = [](const uint8_t* at) { return _mm512_set1_epi64(int64_t(Word(at))); };
    Unroll<16>([&](auto i) __attribute__((always_inline)) {
      __m512i bits = _mm512_mask_broadcastq_epi64(Planes<kTogether>(path), 1, EightBytes(path));
      bits = _mm512_shldv_epi64(bits, all(before), shift);
      bits = _mm512_mask_xor_epi64(bits, 2, bits, all(path));
      next.Row(i);
      body(i, CodesOf(bits, present, from));
      path += row_bytes;
      before += before_step;
      // Or all addresses would be made ahead, more than there are registers.
      asm("" : "+r"(path), "+r"(before));
    });
  }
};

// Calls body(place of the piece, run, piece, constant: planes together) for pieces with numbers and
// runs with rows.
template <typename Body>
[[gnu::always_inline]] inline void EachPieceOfRuns(const PlaneLayout& planes, uint64_t rows,
                                                   Body&& body) {
  for (int first = 0; first < planes.numbers[0]; first += 64) {
    const PieceOfRows piece(planes, first);
    for (int run = 0; run < kTile / 16; ++run) {
      if ((rows >> (16 * run) & 0xffff) == 0) continue;
      if (piece.together) {
        body(first / 64, run, piece, std::true_type());
      } else {
        body(first / 64, run, piece, std::false_type());
      }
    }
  }
}

// Several codes in a byte. A code has one bit more than its number, so those of a key's four tiers
// often have eight bits two by two, or the last three have, and those of a value four. A vector
// then holds 128 numbers: half of the matrices, and half of what turns rows. So it is with most
// rows that presets pack. Head size 128: a vector is a row; 64: two rows, four apart (kRows).
//   bytes of a vector before they are matrices: 8 (2 w + b) bit b of the codes that word w of the
//   path has, b = 0 or 1; 32 planes behind the path, with two rows 16 bytes of each
struct JointCodes {
  static constexpr int kPlanes = 32;
  alignas(64) uint64_t from[8] = {};  // bytes
  uint64_t present = 0;
  uint32_t path_at, planes_at;  // in a row

  template <int kRows, bool kPathAlone = false>
  [[gnu::always_inline]] __m512i Codes(const uint8_t* row, size_t row_bytes) const {
    const uint8_t *path = row + path_at, *planes = row + planes_at;
    // No more than the row: with the last of a run, a line behind it would have to come from
    // memory.
    __m512i bits = _mm512_setzero_si512();
    if constexpr (kPathAlone) {
    } else if constexpr (kRows == 1) {
      bits = _mm512_maskz_broadcast_i64x4(
          0xf0, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes)));
    } else {
      const auto half = [](const uint8_t* at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      };
      bits = _mm512_maskz_broadcast_i32x4(0x0f00, half(planes));
      bits = _mm512_mask_broadcast_i32x4(bits, 0xf000, half(planes + 4 * row_bytes));
    }
    bits = _mm512_mask_broadcastq_epi64(bits, 0x03, EightBytes(path));
    bits = _mm512_mask_broadcastq_epi64(bits, 0x0c,
                                        EightBytes(path + (kRows == 2 ? 4 * row_bytes : 8)));
    const __m512i shift = _mm512_setr_epi64(1, 2, 1, 2, 0, 0, 0, 0);
    const __m512i shifted =
        kRows == 2 ? _mm512_sllv_epi64(bits, shift)
                   : _mm512_shldv_epi64(bits, _mm512_maskz_broadcastq_epi64(0x0c, EightBytes(path)),
                                        shift);
    bits = _mm512_mask_xor_epi64(shifted, 0x0a, shifted, bits);
    return CodesOf(bits, present, _mm512_load_si512(from));
  }

 protected:
  // The matrix bytes of eight bytes of codes: where they are, and which there are.
  struct Matrix {
    uint64_t at = 0, there = 0;
  };

  constexpr JointCodes(const PlaneLayout& planes, int head_dim)
      : path_at(planes.at[0]),
        planes_at(planes.end - std::min(planes.end, uint32_t(head_dim) / 4)) {}

  static constexpr bool PlanesFit(const PlaneLayout& planes, int head_dim) {
    const uint32_t behind_path = planes.n_planes > 1 ? planes.end - planes.at[1] : 0;
    return (head_dim == 64 || head_dim == 128) && behind_path <= uint32_t(head_dim) / 4;
  }
  // Codes of eight numbers of `bits` bits go to bit `low` of the bytes and on. path, rest: where
  // they are in the words of the path, and in the planes behind it, in bytes.
  constexpr void Add(const PlaneLayout& planes, int bits, int low, unsigned path, unsigned rest,
                     Matrix* matrix) {
    for (int b = 0; bits > 0 && b <= bits; ++b) {
      const unsigned at = b < 2 ? path / 8 * 16 + path % 8 + unsigned(8 * b)
                                : kPlanes + planes.at[b - 1] - planes_at + rest;
      const int place = 7 - low - b;
      matrix->at |= uint64_t{at} << (8 * place);
      matrix->there |= uint64_t{1} << place;
    }
  }
  // Lanes have their matrix of two, and its bytes so many further on.
  template <typename MatrixOf, typename Further>
  constexpr void SetLanes(MatrixOf&& matrix_of, Further&& further) {
    for (int l = 0; l < 8; ++l) {
      const Matrix matrix = matrix_of(l);
      from[l] = matrix.at + 0x0101010101010101u * uint64_t(further(l));
      present |= matrix.there << (8 * l);
    }
  }
};

// A row has D / 8 words of four codes. In the first half of them is the first tier, in the second
// half the second one, above it the third, and the last one above the first or the third.
struct JointKeys : JointCodes {
  int low[kTiers] = {};  // the bit of its byte where a tier's code begins
  bool fits;             // they have room
  bool apart;            // the first tier has its bytes alone

  explicit JointKeys(const KeyLayout& layout) : JointCodes(layout.planes, layout.head_dim) {
    const auto [a, b, c, d] = CodeBits(layout);
    apart = a + d > 8;
    fits = PlanesFit(layout.planes, layout.head_dim) && a <= 8 && b + c <= 8 &&
           (!apart || b + c + d <= 8);
    if (!fits) return;
    low[2] = b;
    low[3] = apart ? b + c : a;
    const int groups = layout.per_tier() / 8;  // of eight numbers, in a tier
    Matrix half[2];
    for (int t = 0; t < kTiers; ++t) {
      Add(layout.planes, layout.tier_bits[t], low[t], unsigned(groups * t), unsigned(groups * t),
          &half[t == 1 || t == 2 || (t == 3 && apart)]);
    }
    SetLanes([&](int l) { return half[l / groups % 2]; },
             [&](int l) { return l % groups + 16 * (l / groups / 2); });
  }

 private:
  static std::array<int, kTiers> CodeBits(const KeyLayout& layout) {
    std::array<int, kTiers> bits;
    for (int t = 0; t < kTiers; ++t)
      bits[size_t(t)] = layout.tier_bits[t] > 0 ? layout.tier_bits[t] + 1 : 0;
    return bits;
  }
};

// Found once for all tiles of the same queries, and kept beside them.
inline void PlaceKeys(const KeyLayout& layout, const Scratch& scratch) {
  static_assert(sizeof(JointKeys) <= kPlaceFloats * sizeof(float));
  new (scratch.places) JointKeys(layout);
}
inline const JointKeys& PlacedKeys(const Scratch& scratch) {
  return *reinterpret_cast<const JointKeys*>(scratch.places);
}

// Head size 128: the second half of a row above the first; 64: the second row above the first.
struct JointValues : JointCodes {
  static constexpr bool Fit(const ValueLayout& layout) {
    return TrellisBits(layout.number) <= 3 && PlanesFit(layout.planes, layout.head_dim);
  }
  constexpr explicit JointValues(const ValueLayout& layout)
      : JointCodes(layout.planes, layout.head_dim) {
    const int bits = TrellisBits(layout.number);
    Matrix matrix;
    Add(layout.planes, bits, 0, 0, 0, &matrix);
    Add(layout.planes, bits, 4, 8, layout.head_dim == 64 ? 16 : 8, &matrix);
    SetLanes([&](int) { return matrix; }, [](int l) { return l; });
  }
};

// Matrix that takes bits `first` and on of a byte down to bit 0.
inline __m512i BitsFrom(int first) {
  return _mm512_set1_epi64(first < 8 ? int64_t(0x0102040810204080u << (8 * first)) : 0);
}

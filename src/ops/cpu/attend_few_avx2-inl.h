// AVX2: attention of a handful of query rows over packed and f16 rows. Included inside
// attend_avx2.cc.

// ---- integer keys and values for a handful of query rows ----
//
// Codes are spread to their channels as bytes, 16 rows at a time; from there keys meet the queries,
// and values the softmax weights, in registers. The fixed cost of a packed row falls to half of the
// path above, that of one more query row rises: for more rows it loses.
//   key_j = unit (level_j + ratio restore_j s_j); level = 0 where pruned; s = 1 for +, -1 for -, 0
//   where kept
constexpr int kFewRows = 8;
static_assert(kFewRows <= kScoreRows);

// Keys of 16 rows as bytes at their channels.
struct KeyRun {
  alignas(32) int8_t level[16][kMaxHeadDim];
  alignas(32) int8_t sign[16][kMaxHeadDim];
  alignas(32) float unit[16], ratio[16];
};

inline uint32_t Word32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Scales of all scale codes: two loads instead of two dozen instructions per row.
struct ScaleTable {
  float unit[1024] = {}, ratio[64] = {};
  constexpr ScaleTable() {
    for (int e = 0; e < 1023; ++e) unit[e] = KeyScaleGrid::Value(e) * kLevelUnit;
    unit[kKeyScaleNotFinite] = std::numeric_limits<float>::quiet_NaN();
    for (int r = 0; r < 64; ++r) ratio[r] = RatioValue(r) / kLevelUnit;
  }
};
constexpr ScaleTable kScales;

using LevelRows = uint8_t[16][kMaxHeadDim + 64];

template <sparkv_number kNumber>
[[gnu::noinline]] void LevelRun(KeyLayout layout, const uint8_t* rows16, unsigned rows,
                                LevelRows& levels, KeyRun* out) {
  layout.number = kNumber;
  for (; rows != 0; rows &= rows - 1) {
    const int i = std::countr_zero(rows);
    const uint8_t* row = rows16 + size_t(i) * layout.bytes;
    LevelBytes(layout, row, levels[i]);
    const uint32_t scale = GetScale(row);
    out->unit[i] = kScales.unit[KeyScaleOf(scale)];
    out->ratio[i] = kScales.ratio[RatioOf(scale)];
  }
}

[[gnu::noinline]] void SpreadRun(const KeyLayout& layout, const uint8_t* rows16, unsigned rows,
                                 const LevelRows& levels, KeyRun* out) {
  const int n = layout.head_dim;
  const size_t bytes = layout.bytes, mask_at = layout.mask_at, sign_at = layout.sign_at;
  const bool masked = layout.mask_bytes != 0, signs = layout.sign_bytes != 0;
  const uint32_t unmasked = layout.kept > 0 ? ~0u : 0u;
  for (; rows != 0; rows &= rows - 1) {
    const int i = std::countr_zero(rows);
    const uint8_t* row = rows16 + size_t(i) * bytes;
    const uint8_t* from = levels[i];
    int8_t* level = out->level[i];
    unsigned pruned_rank = 0;
    for (int j = 0; j < n; j += 32) {
      const uint32_t mask = masked ? Word32(row + mask_at + j / 8) : unmasked;
      const auto spread = [&](int b) {
        const unsigned m = mask >> b & 255u;
        const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(Spread(m)));
        const __m128i codes =
            _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), ranks);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(level + j + b), codes);
        from += std::popcount(m);
      };
      // Rows of a run have room behind the last channel; a mask has not.
      spread(0);
      if (n - j > 8) spread(8);
      if (n - j > 16) spread(16);
      if (n - j > 24) spread(24);
      if (!signs) continue;
      uint64_t bits;
      std::memcpy(&bits, row + sign_at + pruned_rank / 8, 8);
      const uint32_t plus = _pdep_u32(uint32_t(bits >> (pruned_rank % 8)), ~mask);
      pruned_rank += 32 - unsigned(std::popcount(mask));
      // -1 where pruned, and twice 1 more where positive.
      const __m256i pruned = ByteMask<false>(mask), positive = ByteMask<true>(plus);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out->sign[i] + j),
                         _mm256_sub_epi8(_mm256_sub_epi8(pruned, positive), positive));
    }
  }
}

inline void UnpackRun(const KeyLayout& layout, const uint8_t* rows16, unsigned rows, KeyRun* out) {
  alignas(32) LevelRows levels;
  if (rows != 0xffff) {
    // Rows that are not there score zero, whatever was left at their place.
    std::memset(out->unit, 0, sizeof(out->unit));
    std::memset(out->ratio, 0, sizeof(out->ratio));
  }
  // Levels of all rows first: what was just stored is slow to read back in other pieces.
  WithInteger(layout.number,
              [&](auto number) { LevelRun<number()>(layout, rows16, rows, levels, out); });
  SpreadRun(layout, rows16, rows, levels, out);
}

// Lane i of the result: sum of the lanes of v[i].
inline __m256 SumLanes(const __m256 (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// score [R][64] of query rows row .. row + R - 1 with the keys of a run. restore: NULL when pruned
// channels are zero.
template <int R>
[[gnu::noinline]] void RunScores(const QueryBlock& block, int row, const float* restore,
                                 const KeyRun& keys, int run, float* score) {
  const size_t n = size_t(block.k_dim), q_stride = block.q_stride;
  const float* q = block.q + size_t(row) * q_stride;
  score += row * kTile + 16 * run;
  const auto wide = [](const int8_t* p) {
    return Floats8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  };
  for (int t0 = 0; t0 < 16; t0 += 8) {
    __m256 sum[R][8];
    // Two keys share the loads of the queries.
    for (int i = 0; i < 8; i += 2) {
      const int8_t* level = keys.level[t0 + i];
      const int8_t* sign = keys.sign[t0 + i];
      const __m256 ratio0 = _mm256_broadcast_ss(&keys.ratio[t0 + i]),
                   ratio1 = _mm256_broadcast_ss(&keys.ratio[t0 + i + 1]);
      __m256 acc0[R], acc1[R];
      for (int r = 0; r < R; ++r) acc0[r] = acc1[r] = _mm256_setzero_ps();
      const auto meet = [&](size_t j, __m256 k0, __m256 k1) {
        for (int r = 0; r < R; ++r) {
          const __m256 x = _mm256_loadu_ps(q + size_t(r) * q_stride + j);
          acc0[r] = _mm256_fmadd_ps(k0, x, acc0[r]);
          acc1[r] = _mm256_fmadd_ps(k1, x, acc1[r]);
        }
      };
      if (restore != nullptr) {
        for (size_t j = 0; j < n; j += 8) {
          const __m256 a = _mm256_loadu_ps(restore + j);
          meet(j, _mm256_fmadd_ps(_mm256_mul_ps(ratio0, a), wide(sign + j), wide(level + j)),
               _mm256_fmadd_ps(_mm256_mul_ps(ratio1, a), wide(sign + kMaxHeadDim + j),
                               wide(level + kMaxHeadDim + j)));
        }
      } else {
        for (size_t j = 0; j < n; j += 8) {
          meet(j, wide(level + j), wide(level + kMaxHeadDim + j));
        }
      }
      for (int r = 0; r < R; ++r) {
        sum[r][i] = acc0[r];
        sum[r][i + 1] = acc1[r];
      }
    }
    const __m256 unit = _mm256_load_ps(keys.unit + t0);
    for (int r = 0; r < R; ++r)
      _mm256_storeu_ps(score + r * kTile + t0, _mm256_mul_ps(SumLanes(sum[r]), unit));
  }
}

// A vector whose lanes hold 4 (8-bit) or 8 (4-bit) codes each becomes one vector of floats per
// code: masked in place, so code k comes out 2^(bits k) too large, which the sums' scales undo.
// kFrom: the first code of four.
template <bool kBytes, int kFrom>
inline void FourCodes(__m256i word, __m256 (&x)[4]) {
  constexpr int kBits = kBytes ? 8 : 4;
  if constexpr (kFrom > 0) word = _mm256_srli_epi32(word, kFrom * kBits);
  const auto masked = [&](int mask) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(mask)));
  };
  x[0] = masked((1 << kBits) - 1);
  x[1] = masked(((1 << kBits) - 1) << kBits);
  x[2] = masked(((1 << kBits) - 1) << 2 * kBits);
  // The last byte would be a sign.
  x[3] = kBytes ? _mm256_cvtepi32_ps(_mm256_srli_epi32(word, 24)) : masked(15 << 12);
}

// sum[r][k] = sum over the rows of the tile of weight[r] * codes k of the lanes of the 32 bytes at
// `at` of a row.
template <int R, bool kBytes, int kFrom>
[[gnu::noinline]] void SumCodes(const PackedTile& tile, size_t bytes, size_t at,
                                const float* weight, __m256 (&sum)[R][4]) {
  __m256 own[R][4];
  Unroll<4 * R>([&](auto i) { own[i / 4][i % 4] = _mm256_setzero_ps(); });
  for (int run = 0; run < kTile / 16; ++run) {
    for (unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu; rows != 0; rows &= rows - 1) {
      const int i = std::countr_zero(rows);
      __m256 x[4];
      FourCodes<kBytes, kFrom>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                   tile.value[run] + size_t(i) * bytes + at)),
                               x);
      Unroll<R>([&](auto r) {
        const __m256 w = _mm256_broadcast_ss(weight + r * kTile + 16 * run + i);
        Unroll<4>([&](auto k) { own[r][k] = _mm256_fmadd_ps(w, x[k], own[r][k]); });
      });
    }
  }
  Unroll<4 * R>([&](auto i) { sum[i / 4][i % 4] = own[i / 4][i % 4]; });
}

// o[r] = o[r] * correction[r] + sum_t weight_rt value_t for R rows; weight [R][64] with the scales
// of the value rows in it.
//   value = scale (c - middle) / middle
template <int R, bool kBytes>
inline void RunValues(const ValueLayout& layout, const PackedTile& tile, const float* weight,
                      const float* total, const float* correction, float* o, size_t o_stride) {
  constexpr int kCodes = kBytes ? 4 : 8;
  constexpr float kMiddle = kBytes ? 127.5f : 7.5f;
  for (int c = 0; c < layout.head_dim; c += 8 * kCodes) {
    const size_t at = layout.scale_bytes + size_t(kBytes ? c : c / 2);
    __m256 sum[R][4], sum4[R][4];
    SumCodes<R, kBytes, 0>(tile, layout.bytes, at, weight, sum);
    if constexpr (!kBytes) SumCodes<R, kBytes, 4>(tile, layout.bytes, at, weight, sum4);
    for (int r = 0; r < R; ++r) {
      // Code k of lane i is channel c + kCodes i + k: turned, lanes are channels in order.
      Vec block[8];
      for (int k = 0; k < kCodes; ++k) {
        const float unit =
            kBytes && k == 3 ? 1.0f : 1.0f / float(1 << (kBytes ? 8 * k : 4 * (k % 4)));
        block[k] = (k < 4 ? sum[r][k] : sum4[r][k - 4]) * (unit / kMiddle) - total[r];
      }
      float* to = o + size_t(r) * o_stride + c;
      const auto add = [&](int j, Vec x) {
        if (size_t(c + j) < o_stride) Store(to + j, Load(to + j) * correction[r] + x);
      };
      if constexpr (kBytes) {
        const __m256 a = _mm256_unpacklo_ps(block[0], block[1]),
                     b = _mm256_unpackhi_ps(block[0], block[1]);
        const __m256 d = _mm256_unpacklo_ps(block[2], block[3]),
                     e = _mm256_unpackhi_ps(block[2], block[3]);
        const auto joined = [](__m256 low, __m256 high) {
          return std::pair(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
        };
        const auto [q0, q1] = joined(a, d);
        const auto [q2, q3] = joined(b, e);
        add(0, _mm256_permute2f128_ps(q0, q1, 0x20));
        add(8, _mm256_permute2f128_ps(q2, q3, 0x20));
        add(16, _mm256_permute2f128_ps(q0, q1, 0x31));
        add(24, _mm256_permute2f128_ps(q2, q3, 0x31));
      } else {
        TransposeStage<1>(block);
        for (int i = 0; i < 8; ++i) add(8 * i, block[i]);
      }
    }
  }
}

// Tiered keys of 16 rows: levels as bytes, those of a first tier of more than 5 bits as floats.
struct TierRun {
  alignas(32) int8_t level[16][kMaxHeadDim];
  alignas(32) float wide[16][kMaxHeadDim / kTiers];
  float unit[16][kTiers];
};

inline bool WideTier(const KeyLayout& layout) { return layout.tier_bits[0] > kByteBits; }

struct GainTable {
  float key[kMaxTrellisBits + 1][64] = {}, value[5][256] = {};
  constexpr GainTable() {
    for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
      const float inverse_top = kTrellisLevels[bits].inverse_top;
      for (int e = 0; e < 64; ++e) key[bits][e] = TierGainGrid::Value(e) * inverse_top;
      key[bits][kTierGainNotFinite] = std::numeric_limits<float>::quiet_NaN();
      for (int e = 0; bits < 5 && e < 255; ++e)
        value[bits][e] = ValueGainGrid::Value(e) * inverse_top;
    }
  }
};
constexpr GainTable kGains;

[[gnu::noinline]] void UnpackRun(const KeyLayout& layout, const Piece* pieces,
                                 const uint8_t* rows16, unsigned rows, TierRun* out) {
  const size_t bytes = layout.bytes;
  // Rows that are not there score zero, whatever is at their place.
  if (rows != 0xffff) std::memset(out->unit, 0, sizeof(out->unit));
  const float* units[kTiers];
  for (int t = 0; t < kTiers; ++t) units[t] = kGains.key[layout.tier_bits[t]];
  for (; rows != 0; rows &= rows - 1) {
    const int i = std::countr_zero(rows);
    const uint32_t gains = Word32(rows16 + size_t(i) * bytes);
    for (int t = 0; t < kTiers; ++t) out->unit[i][t] = units[t][gains >> (6 * t) & 63];
  }
  for (int first = 0; first < layout.planes.numbers[0]; first += 64) {
    const Piece& piece = pieces[first / 64];
    const int wide =
        int(std::count_if(piece.bits, piece.bits + 4, [](int bits) { return bits > kByteBits; }));
    WithPlanes(piece.n_planes, [&](auto planes) {
      for (int i = 0; i < 16; ++i) {
        __m256i codes[2];
        piece.Codes<planes()>(rows16 + size_t(i) * bytes, codes);
        for (int h = 0; h < 2; ++h) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(out->level[i] + first + 32 * h),
                             piece.Levels(h, codes[h]));
        }
        const auto widen = [&](int c, __m128i code) {
          float* to = out->wide[i] + first + 16 * c;
          _mm256_store_ps(to, WideLevels(piece.bits[c], code));
          _mm256_store_ps(to + 8, WideLevels(piece.bits[c], _mm_srli_si128(code, 8)));
        };
        if (wide > 0) widen(0, _mm256_castsi256_si128(codes[0]));
        if (wide > 1) widen(1, _mm256_extracti128_si256(codes[0], 1));
        if (wide > 2) widen(2, _mm256_castsi256_si128(codes[1]));
        if (wide > 3) widen(3, _mm256_extracti128_si256(codes[1], 1));
      }
    });
  }
}

// The same for tiers; queries as PrepareTiers left them.
template <int R>
[[gnu::noinline]] void RunScores(const KeyLayout& layout, const float* queries, int row,
                                 const TierRun& keys, int run, float* score) {
  const size_t stride = PadTo16(layout.head_dim);
  const size_t per_tier = size_t(layout.per_tier());
  const float* q = queries + size_t(row) * stride;
  const bool wide = WideTier(layout);
  score += row * kTile + 16 * run;
  for (int t0 = 0; t0 < 16; t0 += 8) {
    __m256 sum[R][8];
    for (int i = 0; i < 8; i += 2) {
      __m256 acc[2][R];
      for (int r = 0; r < R; ++r) acc[0][r] = acc[1][r] = _mm256_setzero_ps();
      const auto meet = [&](size_t j, __m256 k0, __m256 k1) {
        for (int r = 0; r < R; ++r) {
          const __m256 x = _mm256_loadu_ps(q + size_t(r) * stride + j);
          acc[0][r] = _mm256_fmadd_ps(k0, x, acc[0][r]);
          acc[1][r] = _mm256_fmadd_ps(k1, x, acc[1][r]);
        }
      };
      const int key = t0 + i;
      for (size_t t = 0; t < size_t(kTiers) && layout.tier_bits[t] > 0; ++t) {
        const __m256 unit0 = _mm256_broadcast_ss(&keys.unit[key][t]),
                     unit1 = _mm256_broadcast_ss(&keys.unit[key + 1][t]);
        for (size_t j = t * per_tier; j < (t + 1) * per_tier; j += 8) {
          if (t == 0 && wide) {
            meet(j, _mm256_mul_ps(unit0, _mm256_load_ps(keys.wide[key] + j)),
                 _mm256_mul_ps(unit1, _mm256_load_ps(keys.wide[key + 1] + j)));
          } else {
            const auto level = [&](int k) {
              return Floats8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(keys.level[k] + j)));
            };
            meet(j, _mm256_mul_ps(unit0, level(key)), _mm256_mul_ps(unit1, level(key + 1)));
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        sum[r][i] = acc[0][r];
        sum[r][i + 1] = acc[1][r];
      }
    }
    for (int r = 0; r < R; ++r) _mm256_storeu_ps(score + r * kTile + t0, SumLanes(sum[r]));
  }
}

// Trellis-coded values of a tile as levels; rows that are not there are not touched.
struct ValueLevels {
  alignas(32) int8_t level[kTile][kMaxHeadDim];
};

[[gnu::noinline]] void UnpackValues(const ValueLayout& layout, const PackedTile& tile,
                                    ValueLevels* out) {
  for (int first = 0; first < layout.head_dim; first += 64) {
    const Piece piece(RunsOf(layout), first);
    WithPlanes<4>(piece.n_planes, [&](auto planes) {
      for (uint64_t rows = tile.rows; rows != 0; rows &= rows - 1) {
        const int t = std::countr_zero(rows);
        __m256i codes[2];
        piece.Codes<planes()>(tile.value[t / 16] + size_t(t % 16) * layout.bytes, codes);
        for (int h = 0; h < 2; ++h) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(out->level[t] + first + 32 * h),
                             piece.Levels(h, codes[h]));
        }
      }
    });
  }
}

// o[r] = o[r] * correction[r] + sum_t weight_rt level_t, kBlock vectors of eight channels from c.
template <int R, int kBlock>
inline void LevelBlock(const ValueLevels& values, uint64_t rows, const float* weight,
                       const float* correction, int c, float* o, size_t o_stride) {
  __m256 sum[R][kBlock];
  Unroll<R * kBlock>([&](auto i) { sum[i / kBlock][i % kBlock] = _mm256_setzero_ps(); });
  for (; rows != 0; rows &= rows - 1) {
    const int t = std::countr_zero(rows);
    __m256 x[kBlock];
    Unroll<kBlock>([&](auto v) {
      x[v] = Floats8(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values.level[t] + c + 8 * int(v))));
    });
    Unroll<R>([&](auto r) {
      const __m256 w = _mm256_broadcast_ss(weight + r * kTile + t);
      Unroll<kBlock>([&](auto v) { sum[r][v] = _mm256_fmadd_ps(w, x[v], sum[r][v]); });
    });
  }
  Unroll<R>([&](auto r) {
    Unroll<kBlock>([&](auto v) {
      float* to = o + size_t(r) * o_stride + c + 8 * v;
      Store(to, Load(to) * correction[r] + sum[r][v]);
    });
  });
}

template <int R>
[[gnu::noinline]] void LevelValues(const ValueLayout& layout, const ValueLevels& values,
                                   uint64_t rows, const float* weight, const float* correction,
                                   float* o, size_t o_stride) {
  int c = 0;
  for (; c + 32 <= layout.head_dim; c += 32)
    LevelBlock<R, 4>(values, rows, weight, correction, c, o, o_stride);
  for (; c < layout.head_dim; c += 8)
    LevelBlock<R, 1>(values, rows, weight, correction, c, o, o_stride);
}

void AttendFew(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
               const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
               const Scratch& scratch, const AttentionState& state) {
  PrefetchNext(tile);
  // What the weights of a value row are multiplied with.
  alignas(32) float unit[kTile] = {};
  uint64_t not_finite = 0;
  const float* gains = value.trellis() ? kGains.value[TrellisBits(value.number)] : nullptr;
  for (uint64_t rows = tile.rows; rows != 0; rows &= rows - 1) {
    const int t = std::countr_zero(rows);
    const uint8_t* row = tile.value[t / 16] + size_t(t % 16) * value.bytes;
    const int e = gains != nullptr ? row[0] : int(GetScale(row));
    const bool finite = e != (gains != nullptr ? kValueGainNotFinite : kValueScaleNotFinite);
    not_finite |= uint64_t{!finite} << t;
    unit[t] = gains != nullptr ? gains[e] : finite ? ValueScaleGrid::Value(e) : 0.0f;
  }
  const auto in_runs = [&](auto&& body) {
    for (int run = 0; run < kTile / 16; ++run) {
      if (const unsigned rows = unsigned(tile.rows >> (16 * run)) & 0xffffu; rows != 0)
        body(run, rows);
    }
  };
  if (key.tiered()) {
    TierRun keys;
    Piece pieces[kMaxHeadDim / 64];
    for (int first = 0; first < key.head_dim; first += 64)
      pieces[first / 64] = Piece(RunsOf(key), first);
    in_runs([&](int run, unsigned rows) {
      UnpackRun(key, pieces, tile.key[run], rows, &keys);
      InParts<4>(block.n_rows, [&](int row, auto n) {
        RunScores<n()>(key, scratch.queries, row, keys, run, scratch.score);
      });
    });
  } else {
    const float* restore =
        key.sign_bytes != 0 ? KeyWeights(tile.table, key.head_dim).restore : nullptr;
    KeyRun keys;
    in_runs([&](int run, unsigned rows) {
      UnpackRun(key, tile.key[run], rows, &keys);
      InParts<4>(block.n_rows, [&](int row, auto n) {
        RunScores<n()>(block, row, restore, keys, run, scratch.score);
      });
    });
  }
  // A value that is not finite gives no number: its score does, to those who see it.
  for (; not_finite != 0; not_finite &= not_finite - 1) {
    for (int r = 0; r < block.n_rows; ++r)
      scratch.score[r * kTile + std::countr_zero(not_finite)] =
          std::numeric_limits<float>::quiet_NaN();
  }
  float correction[kFewRows], total[kFewRows];
  SoftmaxRows(block, 0, block.n_rows, visible, mask, scratch.score, state, correction);
  for (int r = 0; r < block.n_rows; ++r) {
    float* score = scratch.score + r * kTile;
    Vec sum = {};
    for (int t = 0; t < kTile; t += kVec) {
      const Vec weight = Load(score + t) * Load(unit + t);
      Store(score + t, weight);
      sum += weight;
    }
    total[r] = Reduce(sum, [](Vec a, Vec b) { return a + b; });
  }
  ValueLevels levels;
  if (value.trellis()) UnpackValues(value, tile, &levels);
  InParts<3>(block.n_rows, [&](int row, auto n) {
    const size_t o_stride = size_t(block.o_stride);
    float* o = state.o + size_t(row) * o_stride;
    const float* weight = scratch.score + row * kTile;
    if (value.trellis()) {
      LevelValues<n()>(value, levels, tile.rows, weight, correction + row, o, o_stride);
    } else if (value.number == SPARKV_INT8) {
      RunValues<n(), true>(value, tile, weight, total + row, correction + row, o, o_stride);
    } else {
      RunValues<n(), false>(value, tile, weight, total + row, correction + row, o, o_stride);
    }
  });
}

// ---- f16 rows for a handful of query rows ----

// Rows of f16 at any address; rows whose bit is clear are not read.
struct HalfRows {
  uint64_t rows;
  const uint8_t* key[kTile];
  const uint8_t* value[kTile];
};

inline __m256 Half8(const uint8_t* row, size_t j) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * j)));
}

inline bool Finite(const uint8_t* row, int n) {
  __m128i largest = _mm_setzero_si128();
  for (int j = 0; j < n; j += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * j));
    largest = _mm_max_epu16(largest, _mm_and_si128(h, _mm_set1_epi16(0x7fff)));
  }
  return _mm_movemask_epi8(_mm_cmpgt_epi16(largest, _mm_set1_epi16(0x7bff))) == 0;
}

template <int R>
[[gnu::noinline]] void HalfScores(const QueryBlock& block, int row, const HalfRows& in,
                                  float* score) {
  const size_t n = size_t(block.k_dim);
  const float* q = block.q + size_t(row) * block.q_stride;
  score += row * kTile;
  for (int t0 = 0; t0 < kTile; t0 += 8) {
    const unsigned rows = unsigned(in.rows >> t0) & 255u;
    if (rows == 0) continue;
    __m256 sum[R][8];
    for (int i = 0; i < 8; ++i) {
      __m256 acc[R];
      for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();
      if ((rows >> i & 1) != 0) {
        const uint8_t* key = in.key[t0 + i];
        for (size_t j = 0; j < n; j += 8) {
          const __m256 k = Half8(key, j);
          for (int r = 0; r < R; ++r)
            acc[r] =
                _mm256_fmadd_ps(k, _mm256_loadu_ps(q + size_t(r) * block.q_stride + j), acc[r]);
        }
      }
      for (int r = 0; r < R; ++r) sum[r][i] = acc[r];
    }
    for (int r = 0; r < R; ++r) _mm256_storeu_ps(score + r * kTile + t0, SumLanes(sum[r]));
  }
}

template <int R, int kBlock>
inline void HalfValueBlock(const HalfRows& in, uint64_t rows, const float* weight,
                           const float* correction, int c, float* o, size_t o_stride) {
  __m256 sum[R][kBlock];
  Unroll<R>([&](auto r) {
    Unroll<kBlock>(
        [&](auto v) { sum[r][v] = Load(o + size_t(r) * o_stride + c + 8 * v) * correction[r]; });
  });
  for (; rows != 0; rows &= rows - 1) {
    const int t = std::countr_zero(rows);
    __m256 x[kBlock];
    for (int v = 0; v < kBlock; ++v) x[v] = Half8(in.value[t], size_t(c + 8 * v));
    Unroll<R>([&](auto r) {
      const __m256 w = _mm256_broadcast_ss(weight + r * kTile + t);
      Unroll<kBlock>([&](auto v) { sum[r][v] = _mm256_fmadd_ps(w, x[v], sum[r][v]); });
    });
  }
  Unroll<R>([&](auto r) {
    Unroll<kBlock>([&](auto v) { Store(o + size_t(r) * o_stride + c + 8 * v, sum[r][v]); });
  });
}

void AttendFewHalf(const QueryBlock& block, const HalfRows& in, const uint64_t* visible,
                   const uint16_t* const* mask, const Scratch& scratch,
                   const AttentionState& state) {
  InParts<4>(block.n_rows,
             [&](int row, auto n) { HalfScores<n()>(block, row, in, scratch.score); });
  // A value that is not finite gives no number: its score does, to those who see it.
  uint64_t finite = 0;
  for (uint64_t rows = in.rows; rows != 0; rows &= rows - 1) {
    const int t = std::countr_zero(rows);
    if (Finite(in.value[t], block.v_dim)) {
      finite |= uint64_t{1} << t;
    } else {
      for (int r = 0; r < block.n_rows; ++r)
        scratch.score[r * kTile + t] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  float correction[kFewRows];
  SoftmaxRows(block, 0, block.n_rows, visible, mask, scratch.score, state, correction);
  InParts<3>(block.n_rows, [&](int row, auto n) {
    float* o = state.o + size_t(row) * size_t(block.o_stride);
    const auto values = [&](auto vectors, int c) {
      HalfValueBlock<n(), vectors()>(in, finite, scratch.score + row * kTile, correction + row, c,
                                     o, size_t(block.o_stride));
    };
    int c = 0;
    for (; c + 32 <= block.v_dim; c += 32) values(std::integral_constant<int, 4>(), c);
    for (; c < block.v_dim; c += 8) values(std::integral_constant<int, 1>(), c);
  });
}

// Pages of each row format: keys against queries, weights times values.
#pragma once

#include "ops/gpu/queries-inl.h"

namespace sparkv::gpu {

// Path bits of the numbers one before those of a word: m moves up by one in both halves, the first
// m comes from the tier before.
__device__ inline uint32_t OneNumberUp(uint32_t word, uint32_t tier_before) {
  return ((word << 1) & 0xfffefffeu) | ((tier_before >> 15) & 0x00010001u);
}

// score[rows 16 i + g and + 8][tile] = levels of a tier . queries, up to a factor. path: of the
// tier before, then of this one, the path bits one before and two before those of its word 0 one
// number further on.
template <int kBits, int kWords, int kQTiles>
__device__ inline void TierScores(const uint32_t* words,
                                  const uint32_t (*queries)[kMostTiles][kLanes][2], int lane,
                                  uint32_t (&path)[2][2], float (&score)[2][kQTiles][2]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t* from = words + (8 * i + g) * kBits * kWords;
    uint32_t w[kBits][kWords];
#pragma unroll
    for (int p = 0; p < kBits; ++p) {
#pragma unroll
      for (int j = 0; j < kWords; j += 2) {
        const uint32_t* at = from + p * kWords + j;
        if constexpr (kWords == 1) {
          w[p][j] = *at;
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(at);
          w[p][j] = two.x;
          w[p][j + 1] = two.y;
        }
      }
    }
    const uint32_t one_before = OneNumberUp(w[0][kWords - 1], path[i][1]);
    const uint32_t before_last = kWords > 1 ? w[0][kWords > 1 ? kWords - 2 : 0] : one_before;
    const uint32_t two_before = OneNumberUp(before_last, path[i][0]);
    path[i][0] = before_last;
    path[i][1] = w[0][kWords - 1];
    const auto planes_of = [&](int j, uint32_t(&plane)[kBits + 1]) {
      plane[0] = j >= 1 ? w[0][j > 0 ? j - 1 : 0] : one_before;
      plane[1] = w[0][j] ^ (j >= 2 ? w[0][j > 1 ? j - 2 : 0] : j == 1 ? one_before : two_before);
#pragma unroll
      for (int p = 1; p < kBits; ++p) plane[p + 1] = w[p][j];
    };
    if constexpr (kBits <= kMostByteBits) {
      int sum[kQTiles][2][4] = {}, sum_below[kQTiles][2][4] = {};
#pragma unroll
      for (int j = 0; j < kWords; j += 2) {
        uint32_t a[4] = {}, below[4] = {};
#pragma unroll
        for (int n = 0; n < 2 && j + n < kWords; ++n) {
          uint32_t plane[kBits + 1], level[2], level_below[2] = {};
          planes_of(j + n, plane);
          ByteLevels<kBits>(plane, t, level, level_below);
          a[2 * n] = level[0];
          a[2 * n + 1] = level[1];
          below[2 * n] = level_below[0];
          below[2 * n + 1] = level_below[1];
        }
#pragma unroll
        for (int tile = 0; tile < kQTiles; ++tile) {
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const uint32_t* held = queries[kWords == 1 ? 0 : j + second][tile][lane];
            const uint32_t b[2] = {held[kWords == 1 ? second : 0], kWords == 1 ? 0 : held[1]};
            MultiplyAdd(sum[tile][second], a, b);
            if constexpr (kBits == kMostByteBits) MultiplyAdd(sum_below[tile][second], below, b);
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int digit[3];
#pragma unroll
          for (int n = 0; n < 3; ++n)
            digit[n] = sum[tile][n / 2][2 * r + n % 2] - sum_below[tile][n / 2][2 * r + n % 2];
          score[i][tile][r] = fmaf(float(digit[0] * 256 + digit[1]), 256.0f, float(digit[2]));
        }
      }
    } else {
      float sum[kQTiles][4] = {};
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        uint32_t plane[kBits + 1], level[4];  // of rows g (low half) and g + 8
        planes_of(j, plane);
        Levels<kBits>(plane, t, level);
        const uint32_t a[4] = {
            PickBytes(level[0], level[1], 0x5410), PickBytes(level[0], level[1], 0x7632),
            PickBytes(level[2], level[3], 0x5410), PickBytes(level[2], level[3], 0x7632)};
#pragma unroll
        for (int tile = 0; tile < kQTiles; ++tile) {
          const uint32_t b[2] = {queries[j][tile][lane][0], queries[j][tile][lane][1]};
          MultiplyAdd(sum[tile], a, b);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) score[i][tile][r] = sum[tile][2 * r] + sum[tile][2 * r + 1];
      }
    }
  }
}

// Keys of a page against the queries: score[a][tile] is that of row g + 8 a and query t of the
// tile.
template <int D, int kQTiles>
struct TierKeys {
  static constexpr bool kSwizzled = false;
  static constexpr int kStages = 2;  // pages in shared memory per warp
  // Blocks on a multiprocessor: what registers allow.
  static constexpr int kBlocks = D * kQTiles <= 128 ? 5 : D * kQTiles <= 256 ? 3 : 2;
  __device__ static void Scores(const uint8_t* page, const Prepared<D>& queries, const float* gains,
                                int lane, float (&score)[4][kQTiles]) {
    constexpr int kPerTier = D / kTiers, kWords = kPerTier / 16;
    const int g = lane / 4;
    uint32_t gain[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int row = g + 8 * a;
      gain[a] = *reinterpret_cast<const uint16_t*>(page + 2 * row) |
                uint32_t(page[2 * kPageRows + row]) << 16;
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) score[a][tile] = 0.0f;
    }
    const uint32_t* words = reinterpret_cast<const uint32_t*>(page + kKeyPageGains);
    uint32_t path[2][2] = {};
#pragma unroll 1
    for (int tier = 0; tier < kTiers; ++tier) {
      const int bits = queries.bits[tier];
      float sum[2][kQTiles][2] = {};
      const auto held = queries.b + tier * kWords;
      switch (bits) {
        case 1:
          TierScores<1, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 2:
          TierScores<2, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 3:
          TierScores<3, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 4:
          TierScores<4, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 5:
          TierScores<5, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 6:
          TierScores<6, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        case 7:
          TierScores<7, kWords, kQTiles>(words, held, lane, path, sum);
          break;
        default:
          break;
      }
      words += kPerTier * bits;
      const float* times_of = gains + (bits <= kMostByteBits ? 0 : bits <= 5 ? 64 : 128);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const float times = times_of[gain[a] & 63];
        gain[a] >>= 6;
#pragma unroll
        for (int tile = 0; tile < kQTiles; ++tile)
          score[a][tile] = fmaf(times, sum[a / 2][tile][a % 2], score[a][tile]);
      }
    }
  }
};

// What a lane holds of the softmax weights of rows t, t + 4, .. of a page, for its column of a
// product. Bytes: rows t .. t + 12 and t + 16 .. t + 28, of a whole number of kWeightOne digit 0 or
// (low) 1. Else pairs: rows (t, t + 16), (t + 4, t + 20), .., f16(w) or (low) w - f16(w).
inline constexpr float kWeightOne = 127.0f * 256.0f;
template <bool kBytes>
__device__ inline void HoldWeights(const float (&weights)[8], bool low, uint32_t (&held)[4]) {
  if constexpr (kBytes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      held[i] = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int whole = __float2int_rn(weights[4 * i + n] * kWeightOne),
                  high = (whole + 128) >> 8;
        held[i] |= uint32_t((low ? whole - high * 256 : high) & 255) << (8 * n);
      }
    }
  } else {
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float high = LowOf(PairOf(weights[i], 0.0f));
      part[i] = low ? weights[i] - high : high;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) held[i] = PairOf(part[i], part[i + 4]);
  }
}

// acc[rows 16 i ..][tile] += 16 numbers of rows g + 8 a, as pairs, . the queries that b holds.
template <int kQTiles>
__device__ inline void AddPairScores(const uint32_t (&row)[4][2],
                                     const uint32_t (&b)[kMostTiles][kLanes][2], int lane,
                                     float (&acc)[2][kQTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kQTiles; ++tile) {
    const uint2 pair = *reinterpret_cast<const uint2*>(b[tile][lane]);
    const uint32_t held[2] = {pair.x, pair.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {row[2 * i][0], row[2 * i + 1][0], row[2 * i][1], row[2 * i + 1][1]};
      MultiplyAdd(acc[i][tile], a, held);
    }
  }
}
// What such sums are for row g + 8 a: the queries' parts lie side by side.
template <int kQTiles>
__device__ inline float PairScore(const float (&acc)[2][kQTiles][4], int a, int tile) {
  const float* c = acc[a / 2][tile] + a % 2 * 2;
  return c[0] + c[1];
}

// o += 16 rows of two times 8 channels . weights: step s of a page's rows, weights as pairs.
template <int kQTiles>
__device__ inline void AddPairValues(const uint32_t (&a)[4], const uint32_t (&weights)[kQTiles][4],
                                     int s, float (&o)[kQTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kQTiles; ++tile) {
    const uint32_t b[2] = {weights[tile][2 * s], weights[tile][2 * s + 1]};
    MultiplyAdd(o[tile], a, b);
  }
}
// The row that is the i-th of four which lane t multiplies in step s: those of pairs come together.
__device__ inline int RowOfStep(int s, int t, int i) {
  return 8 * s + t + 16 * (i % 2) + 4 * (i / 2);
}

// Values of a page: sums of weights . levels. o[i]: of channels g D / 8 + 2 i and the next one,
// kSums numbers that add up in halves. fold: what the page's weights are to those before it, bytes
// only.
template <int kBits, int D, int kQTiles>
struct TrellisValues {
  static constexpr bool kBytes = kBits <= kMostByteBits;
  static constexpr int kSums = kBytes ? 2 : 4;
  // log2 of what a level of 1 stands for.
  __device__ static float LogUnit(const uint8_t* page, int row) {
    const int e = page[row];
    const float finite = float(e) * 0.25f - (40.25f + 6.988684687f);  // log2(127)
    return e == 0 ? -INFINITY : e == 255 ? NAN : finite;
  }
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[kQTiles][4],
                             const float (&fold)[kQTiles], uint32_t, int lane,
                             float (&o)[D / 16][kQTiles][kSums]) {
    constexpr int kRun = D / 8;
    const int g = lane / 4, t = lane % 4;
    const uint32_t* mine = reinterpret_cast<const uint32_t*>(page + kValuePageGains) + g * kRun;
    uint32_t two_before = g > 0 ? mine[-2] : 0, one_before = g > 0 ? mine[-1] : 0;
#pragma unroll
    for (int c = 0; c < kRun; c += 4) {
      uint32_t w[kBits][4];
#pragma unroll
      for (int p = 0; p < kBits; ++p) {
        const uint4 four = *reinterpret_cast<const uint4*>(mine + p * D + c);
        w[p][0] = four.x;
        w[p][1] = four.y;
        w[p][2] = four.z;
        w[p][3] = four.w;
      }
      const auto planes_of = [&](int i, uint32_t(&plane)[kBits + 1]) {
        plane[0] = one_before;
        plane[1] = w[0][i] ^ two_before;
#pragma unroll
        for (int p = 1; p < kBits; ++p) plane[p + 1] = w[p][i];
        two_before = one_before;
        one_before = w[0][i];
      };
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t plane[kBits + 1];
        auto& sums = o[(c + i) / 2];
        if constexpr (kBytes) {
          uint32_t level[2][2], below[2][2] = {};
          planes_of(i, plane);
          ByteLevels<kBits>(plane, t, level[0], below[0]);
          planes_of(i + 1, plane);
          ByteLevels<kBits>(plane, t, level[1], below[1]);
          const uint32_t a[4] = {level[0][0], level[1][0], level[0][1], level[1][1]};
          const uint32_t a_below[4] = {below[0][0], below[1][0], below[0][1], below[1][1]};
#pragma unroll
          for (int tile = 0; tile < kQTiles; ++tile) {
            const uint32_t b[2] = {weights[tile][0], weights[tile][1]};
            int sum[4] = {}, sum_below[4] = {};
            MultiplyAdd(sum, a, b);
            if constexpr (kBits == kMostByteBits) MultiplyAdd(sum_below, a_below, b);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int whole =
                  (sum[2 * r] - sum_below[2 * r]) * 256 + sum[2 * r + 1] - sum_below[2 * r + 1];
              sums[tile][r] = fmaf(float(whole), fold[tile], sums[tile][r]);
            }
          }
        } else {
          uint32_t level[2][4];
          planes_of(i, plane);
          Levels<kBits>(plane, t, level[0]);
          planes_of(i + 1, plane);
          Levels<kBits>(plane, t, level[1]);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const uint32_t a[4] = {level[0][2 * s], level[1][2 * s], level[0][2 * s + 1],
                                   level[1][2 * s + 1]};
            AddPairValues(a, weights, s, sums);
          }
        }
      }
    }
  }
};

// Eight-bit keys of the newest rows: | scales u16 [32] | codes [32][D] |, all channels kept.
template <int D, int kQTiles>
struct ByteKeys {
  static constexpr bool kSwizzled = false;
  static constexpr int kStages = 2, kBlocks = TierKeys<D, kQTiles>::kBlocks;
  // Levels of two codes, in bytes 0 and 2: code - 127, less 1 below 128 (LevelOf in
  // format/levels.h).
  __device__ static uint32_t TwoLevels(uint32_t codes) {
    const uint32_t below = (~codes >> 7) & 0x00010001u;
    const uint32_t y = PairAdd((codes & 0x00ff00ffu) | 0x64006400u, BothHalves(-1024.0f - 127.0f));
    return PairAdd(y, PairAdd(below | 0x64006400u, BothHalves(-1024.0f)) ^ 0x80008000u);
  }
  __device__ static void Scores(const uint8_t* page, const Prepared<D>& queries, const float*,
                                int lane, float (&score)[4][kQTiles]) {
    const int g = lane / 4, t = lane % 4;
    const uint8_t* codes = page + 2 * kPageRows;
    float acc[2][kQTiles][4] = {};
#pragma unroll 4
    for (int s = 0; s < D / 16; ++s) {
      uint32_t row[4][2];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint32_t four =
            *reinterpret_cast<const uint32_t*>(codes + (g + 8 * a) * D + 16 * s + 4 * t);
        row[a][0] = TwoLevels((four & 0xff) | (four & 0xff00) << 8);
        row[a][1] = TwoLevels((four >> 16 & 0xff) | (four >> 24) << 16);
      }
      AddPairScores(row, queries.b[s], lane, acc);
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int e = *reinterpret_cast<const uint16_t*>(page + 2 * (g + 8 * a)) & 1023;
      const float largest = e == 0 ? 0.0f : e == 1023 ? NAN : exp2f(float(e - 1) / 32.0f - 16.0f);
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile)
        score[a][tile] = largest * (1.0f / 127.0f) * PairScore(acc, a, tile);
    }
  }
};

// Pairs (row r of `one`, row r of `other`) of channels: bytes i of both words, as f16 1,024 + byte.
__device__ inline uint32_t PairOfBytes(uint32_t one, uint32_t other, int i) {
  return (one >> (8 * i) & 0xff) | (other >> (8 * i) & 0xff) << 16 | 0x64006400u;
}

// Eight-bit values: | scales u16 [32] | codes [32][D] |.
template <int D, int kQTiles>
struct ByteValues {
  static constexpr bool kBytes = false;
  static constexpr int kSums = 4;
  __device__ static float LogUnit(const uint8_t* page, int row) {
    const int e = *reinterpret_cast<const uint16_t*>(page + 2 * row) & 4095;
    const float finite = float(e - 1) / 64.0f - (32.0f + 7.994353437f);  // log2(255)
    return e == 0 ? -INFINITY : e == 4095 ? NAN : finite;
  }
  // Levels are 2 code - 255.
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[kQTiles][4],
                             const float (&)[kQTiles], uint32_t, int lane,
                             float (&o)[D / 16][kQTiles][4]) {
    constexpr int kRun = D / 8;
    const int g = lane / 4, t = lane % 4;
    const uint8_t* mine = page + 2 * kPageRows + g * kRun;
#pragma unroll
    for (int c = 0; c < kRun; c += 4) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t row[4];  // four channels
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = RowOfStep(s, t, i);
          row[i] = *reinterpret_cast<const uint32_t*>(mine + r * D + c);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          uint32_t a[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint32_t code = PairOfBytes(row[k / 2 * 2], row[k / 2 * 2 + 1], i + k % 2);
            // 2 (1,024 + code) - (2,048 + 255): the first sum is exact, the product too.
            a[k] =
                PairFma(PairAdd(code, BothHalves(-1024.0f)), BothHalves(2.0f), BothHalves(-255.0f));
          }
          AddPairValues(a, weights, s, o[(c + i) / 2]);
        }
      }
    }
  }
};

// Rows as they came, f16 [32][D]: the window, and what packed rows are measured against. 16-byte
// pieces of a row change places by its number, so that lanes that read a column meet different
// banks.
template <int D>
__device__ inline int Swizzle(int piece) {
  constexpr int kPieces = D / 8;
  return piece / kPieces * kPieces + (piece % kPieces ^ (piece / kPieces & 7));
}

template <int D, int kQTiles>
struct DenseKeys {
  static constexpr bool kSwizzled = true;
  static constexpr int kStages = D == 256 ? 1 : 2, kBlocks = 1;  // as many as fit
  __device__ static void Scores(const uint8_t* page, const Prepared<D>& queries, const float*,
                                int lane, float (&score)[4][kQTiles]) {
    const int g = lane / 4, t = lane % 4;
    float acc[2][kQTiles][4] = {};
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint32_t row[4][2];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int piece = Swizzle<D>((g + 8 * a) * (D / 8) + 2 * s + t / 2);
        const uint2 two = *reinterpret_cast<const uint2*>(page + 16 * piece + 8 * (t % 2));
        row[a][0] = two.x;
        row[a][1] = two.y;
      }
      AddPairScores(row, queries.b[s], lane, acc);
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) score[a][tile] = PairScore(acc, a, tile);
    }
  }
};

template <int D, int kQTiles>
struct DenseValues {
  static constexpr bool kBytes = false;
  static constexpr int kSums = 4;
  __device__ static float LogUnit(const uint8_t*, int) { return 0.0f; }
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[kQTiles][4],
                             const float (&)[kQTiles], uint32_t rows, int lane,
                             float (&o)[D / 16][kQTiles][4]) {
    constexpr int kRun = D / 8;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < kRun; c += 8) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t row[4][4];  // eight channels
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = RowOfStep(s, t, i);
          const int piece = Swizzle<D>(r * (D / 8) + (g * kRun + c) / 8);
          // 0 times a row that is not there must be 0, and f16 may be anything.
          const uint4 four =
              rows >> r & 1 ? *reinterpret_cast<const uint4*>(page + 16 * piece) : uint4{};
          row[i][0] = four.x;
          row[i][1] = four.y;
          row[i][2] = four.z;
          row[i][3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t a[4] = {
              (row[0][i] & 0xffff) | row[1][i] << 16, row[0][i] >> 16 | (row[1][i] & 0xffff0000u),
              (row[2][i] & 0xffff) | row[3][i] << 16, row[2][i] >> 16 | (row[3][i] & 0xffff0000u)};
          AddPairValues(a, weights, s, o[(c + 2 * i) / 2]);
        }
      }
    }
  }
};

}  // namespace sparkv::gpu

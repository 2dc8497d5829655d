// Attention of one query token per sequence over packed pages, for a whole layer at once. Three
// kernels:
//   PrepareQueries  a head's queries in the form that its keys meet, in the order that lanes read
//   AttendPages     a share of a sequence's pages per warp -> (o, m, d) per block
//   MergeShares     all shares of all stores -> the answer, values turned back from their rotation
// Keys are multiplied as they lie: codes become levels in registers, levels meet the queries in the
// matrix unit, 16 rows by 16 numbers by 4 queries at a time. A query and a softmax weight take two
// columns there, f16(x) and f16(x - f16(x)), which costs nothing, since the unit has eight columns
// and a group has few queries: f16 products with the accuracy of f32.
#pragma once

#include "base/half.h"
#include "format/page_layout.h"
#include "ops/gpu/platform.h"

namespace sparkv::gpu {

inline constexpr int kWarps = 4, kLanes = 32;
inline constexpr int kQueriesPerTile = 4;  // columns of a product / 2
inline constexpr int kMostTiles = 2;       // so eight queries share what is unpacked

struct Pages {
  const uint8_t *keys, *values;  // page i of KV head h at (i * kv_heads + h) * bytes
  const uint16_t* weights;       // [sequences][kv_heads][D], keys with tiers only
  const int32_t* table;          // [sequences][max_pages], the pages of a sequence
  const uint32_t* rows;          // [sequences][max_pages], rows that count; NULL: the first n_rows
  const int32_t* n_rows;         // [sequences]
  uint32_t key_bytes, value_bytes;  // of a page
  int32_t max_pages;
  int32_t key_sum;  // bits that four numbers of a key share, 0 without tiers
};

struct Step {
  const float* q;                 // [sequences][kv_heads * group][D]
  float* out;                     // likewise
  int kv_heads, group, n_blocks;  // n_blocks: of eight queries, per KV head
  float scale, softcap;
};

// What a head's queries became. One per sequence, KV head and block of queries.
template <int D>
struct Prepared {
  uint32_t pairs[D / 16][kMostTiles][kLanes][2];
  float unit[8];  // scale of a query's numbers
  int32_t bits[kTiers];
};

// One share's outcome for eight queries; o in units of 2^m.
template <int D>
struct Share {
  float m[8], d[8];
  float o[8][D];
};

// The numbers of a key that a lane multiplies: number of pair `half` in word j of a 16-number step.
template <int D>
__device__ inline int NumberOf(int step, int lane_in_four, int word, int half) {
  constexpr int kPerTier = D / kTiers, kStrides = kPerTier / 8, kSteps = kStrides / 2;
  const int tier = step / kSteps, j = step % kSteps * 2 + word;
  return tier * kPerTier + j + kStrides * (lane_in_four + 4 * half);
}
// Rows without tiers lie in the order of channels.
template <int D>
__device__ inline int ChannelOf(int step, int lane_in_four, int word, int half) {
  return 16 * step + 4 * lane_in_four + 2 * word + half;
}

// The rotation of format "trellis", unscaled; sync: of the n threads that do it together.
template <int D, typename Sync>
__device__ inline void RotateTogether(float* x, int thread, int n, int block, Sync&& sync) {
  for (int half = 1; half < block; half *= 2) {
    sync();
    for (int i = thread; i < D / 2; i += n) {
      const int a = i / half * 2 * half + i % half;
      const float s = x[a] + x[a + half], d = x[a] - x[a + half];
      x[a] = s;
      x[a + half] = d;
    }
  }
  sync();
}

// 256 threads, a warp for each of eight queries.
template <int D>
__global__ void PrepareQueries(Step step, Pages pages, Prepared<D>* out) {
  __shared__ float rows[8][D];
  __shared__ uint16_t weights[D];
  __shared__ int place[D];           // where a channel lies in the order of the tiers
  __shared__ int counts[kTiers][8];  // channels of a tier among 32
  const int thread = int(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int head = int(blockIdx.y) / step.n_blocks, block = int(blockIdx.y) % step.n_blocks;
  const int entry = int(blockIdx.z) * step.kv_heads + head;
  Prepared<D>& to = out[entry * step.n_blocks + block];
  const bool tiers = pages.key_sum > 0;

  unsigned alike = 0;  // lanes of this warp whose channels are in this one's tier
  if (thread < D) {
    weights[thread] = tiers ? pages.weights[size_t(entry) * D + thread] : 0x3c00;
    for (int tier = 0; tier < kTiers; ++tier) {
      const unsigned in_tier = __ballot_sync(~0u, TierOf(weights[thread]) == tier);
      if (TierOf(weights[thread]) == tier) alike = in_tier;
      if (lane == 0) counts[tier][warp] = __popc(in_tier);
    }
  }
  __syncthreads();
  if (thread < D) {
    const int mine = TierOf(weights[thread]);
    int before = __popc(alike & ((1u << lane) - 1));
    for (int tier = 0; tier < kTiers; ++tier) {
      for (int w = 0; w < D / kLanes; ++w) {
        if (tier < mine || (tier == mine && w < warp)) before += counts[tier][w];
      }
    }
    place[thread] = tiers ? before : thread;
  }
  if (thread == 0 && tiers) {
    int fall[kTiers - 1], bits[kTiers];
    for (int t = 0; t < kTiers - 1; ++t) fall[t] = TierFall(weights, t);
    ShareBits(fall, pages.key_sum, bits);
    for (int t = 0; t < kTiers; ++t) to.bits[t] = bits[t];
  }
  __syncthreads();

  float* x = rows[warp];
  const bool there = 8 * block + warp < step.group;
  const float* q = step.q + (size_t(entry) * step.group + 8 * block + warp) * D;
  for (int j = lane; j < D; j += kLanes)
    x[place[j]] = there ? q[j] * HalfToFloat(weights[j]) : 0.0f;
  const int rotation = tiers ? RotationBlock(D / kTiers) : 1;
  RotateTogether<D>(x, lane, kLanes, rotation, [] { __syncwarp(); });
  float most = 0.0f;
  for (int j = lane; j < D; j += kLanes) most = fmaxf(most, fabsf(x[j]));
  for (int apart = 1; apart < kLanes; apart *= 2)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
  // A power of two, so that scaling is exact and f16(x) never overflows.
  const float unit = most > 0.0f ? exp2f(ceilf(log2f(most))) : 1.0f;
  if (lane == 0) to.unit[warp] = unit * rsqrtf(float(rotation));
  for (int i = lane; i < D; i += kLanes) {
    const int word = i % 2, t = i / 2 % 4, low = i / 8 % 2, s = i / 16;  // low: x - f16(x)
    float part[2];
    for (int half = 0; half < 2; ++half) {
      const float value =
          x[tiers ? NumberOf<D>(s, t, word, half) : ChannelOf<D>(s, t, word, half)] / unit;
      const float high = LowOf(PairOf(value, 0.0f));
      part[half] = low == 0 ? high : value - high;
    }
    const int column = warp % kQueriesPerTile * 2 + low;
    to.pairs[s][warp / kQueriesPerTile][4 * column + t][word] = PairOf(part[0], part[1]);
  }
}

// Levels of eight numbers that a lane finds in words of planes: bits t, t + 4, .. of plane k are
// bit k of their codes. out[a]: number a and, in the high half, a + 4.
//   y = code - (h - 1/2),  level = y (linear + square |y|) to the nearest whole number
//   (docs/format.md).
// Up to five bits this is exact in f16 with these two factors: tested for every code.
struct LevelFactors {
  float linear, square;
};
constexpr LevelFactors kPairFactors[6] = {{0.0f, 0.0f},
                                          {38.53125f, 30.78125f},
                                          {16.4375f, 5.64453125f},
                                          {7.58984375f, 1.2412109375f},
                                          {3.61328125f, 0.29736328125f},
                                          {1.814453125f, 0.0704345703125f}};
constexpr uint32_t BothHalves(float x) {
  // f16 of a number that is one, above the subnormal ones.
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t half = (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
  return half | half << 16;
}

template <int kBits>
__device__ inline void Levels(const uint32_t (&plane)[kBits + 1], int t, uint32_t (&out)[4]) {
  constexpr float kCentre = float(1 << kBits) - 0.5f;
  // Field a of `low` is bits 4 a + 1 .. 4 a + 4, so that 512 + code can be written down as f16 with
  // a bit below it for the half in y; the upper bits of codes stand in `high` where they follow.
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int k = 0; k <= kBits; ++k) {
    const uint32_t turned = __funnelshift_l(plane[k], plane[k], (k + 1 - t) & 31);
    const uint32_t field = k % 4 == 3 ? 0x11111111u : 0x22222222u << (k % 4);
    if (k < 4)
      low |= turned & field;
    else
      high |= turned & field;
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    uint32_t y;
    if constexpr (kBits < 4) {
      const uint32_t pair_of_fields = a < 2 ? low : __funnelshift_r(low, low, 8);
      y = a % 2 == 0
              ? PairAdd(Pick<0x001e001e, 0x60006000>(pair_of_fields), BothHalves(-512.0f - kCentre))
              : PairFma(Pick<0x01e001e0, 0x60006000>(pair_of_fields),
                        BothHalves(0.0625f),  // 512 + 16 code
                        BothHalves(-32.0f - kCentre));
    } else {
      const uint32_t first = a == 0 ? low : __funnelshift_r(low, low, 4 * a);
      const uint32_t more = a == 0 ? high : __funnelshift_r(high, high, 4 * a);
      y = PairAdd(Pick<0x001e001e, 0x60006000>(first) | (more & 0x01e001e0u),
                  BothHalves(-512.0f - kCentre));
    }
    if constexpr (kBits <= 5) {
      constexpr LevelFactors f = kPairFactors[kBits];
      const uint32_t slope = PairFma(PairAbs(y), BothHalves(f.square), BothHalves(f.linear));
      // 1,536 + level has no room for a fraction.
      out[a] = PairAdd(PairFma(slope, y, BothHalves(1536.0f)), BothHalves(-1536.0f));
    } else {
      constexpr float kSquare = 0.55f * 1023.0f / kCentre / kCentre,
                      kLinear = 0.45f * 1023.0f / kCentre;
      constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
      const float low_y = LowOf(y), high_y = HighOf(y);
      const float low_level = fmaf(fmaf(fabsf(low_y), kSquare, kLinear), low_y, kWhole) - kWhole;
      const float high_level = fmaf(fmaf(fabsf(high_y), kSquare, kLinear), high_y, kWhole) - kWhole;
      out[a] = PairOf(low_level, high_level);
    }
  }
}

// Path bits of the numbers one before those in a word whose bits are m of J m + j: m moves up by
// one, the first m comes from the tier before.
__device__ inline uint32_t OneNumberUp(uint32_t word, uint32_t tier_before) {
  return ((word << 1) & 0xeeeeeeeeu) | (__funnelshift_l(tier_before, word, 13) & 0x11111111u);
}

// acc[rows 16 i ..][tile] += levels of a tier . queries. path: the last two words of path bits of
// the tier before, then of this one.
template <int kBits, int J, int kQTiles>
__device__ inline void TierScores(const uint32_t* words,
                                  const uint32_t (*pairs)[kMostTiles][kLanes][2], int lane,
                                  uint32_t (&path)[2], float (&acc)[2][kQTiles][4]) {
  const int g = lane / 4, t = lane % 4;
  uint32_t w[kBits][J];
#pragma unroll
  for (int p = 0; p < kBits; ++p) {
    const uint32_t* from = words + (g * kBits + p) * J;
#pragma unroll
    for (int j = 0; j < J; j += 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from + j);
      w[p][j] = two.x;
      w[p][j + 1] = two.y;
    }
  }
  const uint32_t before_one = OneNumberUp(w[0][J - 1], path[1]);
  const uint32_t before_two = OneNumberUp(w[0][J - 2], path[0]);
  path[0] = w[0][J - 2];
  path[1] = w[0][J - 1];
#pragma unroll
  for (int s = 0; s < J / 2; ++s) {
    uint32_t level[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * s + i;
      uint32_t plane[kBits + 1];
      plane[0] = j >= 1 ? w[0][j > 0 ? j - 1 : 0] : before_one;
      plane[1] = w[0][j] ^ (j >= 2 ? w[0][j > 1 ? j - 2 : 0] : j == 1 ? before_one : before_two);
#pragma unroll
      for (int p = 1; p < kBits; ++p) plane[p + 1] = w[p][j];
      Levels<kBits>(plane, t, level[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kQTiles; ++tile) {
      const uint2 pair = *reinterpret_cast<const uint2*>(pairs[s][tile][lane]);
      const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {level[0][2 * i], level[0][2 * i + 1], level[1][2 * i],
                               level[1][2 * i + 1]};
        MultiplyAdd(acc[i][tile], a, b);
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
  __device__ static void Scores(const uint8_t* page, const Prepared<D>& queries, const float* gains,
                                int lane, float (&score)[4][kQTiles]) {
    constexpr int kPerTier = D / kTiers, J = kPerTier / 8;
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
    uint32_t path[2] = {0, 0};
#pragma unroll 1
    for (int tier = 0; tier < kTiers; ++tier) {
      const int bits = queries.bits[tier];
      float acc[2][kQTiles][4] = {};
      const auto pairs = queries.pairs + tier * (J / 2);
      switch (bits) {
        case 1:
          TierScores<1, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 2:
          TierScores<2, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 3:
          TierScores<3, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 4:
          TierScores<4, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 5:
          TierScores<5, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 6:
          TierScores<6, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        case 7:
          TierScores<7, J, kQTiles>(words, pairs, lane, path, acc);
          break;
        default:
          break;
      }
      words += kPerTier * bits;
      const float* times_of = bits >= 6 ? gains + 64 : gains;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const float times = times_of[gain[a] & 63];
        gain[a] >>= 6;
#pragma unroll
        for (int tile = 0; tile < kQTiles; ++tile) {
          const float* c = acc[a / 2][tile] + a % 2 * 2;
          score[a][tile] = fmaf(times, c[0] + c[1], score[a][tile]);
        }
      }
    }
  }
};

// Values of a page: o += weights . levels. weights: pairs of rows (8 s + t, 8 s + t + 16) and (8 s
// + t + 4, 8 s + t + 20). o[i]: channels g D / 8 + 2 i and the next one.
template <int kBits, int D, int kQTiles>
struct TrellisValues {
  // log2 of what a level of 1 stands for.
  __device__ static float LogUnit(const uint8_t* page, int row) {
    const int e = page[row];
    const float finite = float(e) * 0.25f - (40.25f + 6.988684687f);  // log2(127)
    return e == 0 ? -INFINITY : e == 255 ? NAN : finite;
  }
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[2][kQTiles][2],
                             uint32_t, int lane, float (&o)[D / 16][kQTiles][4]) {
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
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t level[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t path = w[0][i + half];
          uint32_t plane[kBits + 1];
          plane[0] = one_before;
          plane[1] = path ^ two_before;
#pragma unroll
          for (int p = 1; p < kBits; ++p) plane[p + 1] = w[p][i + half];
          two_before = one_before;
          one_before = path;
          Levels<kBits>(plane, t, level[half]);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint32_t a[4] = {level[0][2 * s], level[1][2 * s], level[0][2 * s + 1],
                                 level[1][2 * s + 1]};
#pragma unroll
          for (int tile = 0; tile < kQTiles; ++tile)
            MultiplyAdd(o[(c + i) / 2][tile], a, weights[s][tile]);
        }
      }
    }
  }
};

// Eight-bit keys of the newest rows: | scales u16 [32] | codes [32][D] |, all channels kept.
template <int D, int kQTiles>
struct ByteKeys {
  static constexpr bool kSwizzled = false;
  static constexpr int kStages = 2;
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
      uint32_t level[4][2];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint32_t four =
            *reinterpret_cast<const uint32_t*>(codes + (g + 8 * a) * D + 16 * s + 4 * t);
        level[a][0] = TwoLevels((four & 0xff) | (four & 0xff00) << 8);
        level[a][1] = TwoLevels((four >> 16 & 0xff) | (four >> 24) << 16);
      }
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const uint2 pair = *reinterpret_cast<const uint2*>(queries.pairs[s][tile][lane]);
        const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a[4] = {level[2 * i][0], level[2 * i + 1][0], level[2 * i][1],
                                 level[2 * i + 1][1]};
          MultiplyAdd(acc[i][tile], a, b);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int e = *reinterpret_cast<const uint16_t*>(page + 2 * (g + 8 * a)) & 1023;
      const float largest = e == 0 ? 0.0f : e == 1023 ? NAN : exp2f(float(e - 1) / 32.0f - 16.0f);
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const float* c = acc[a / 2][tile] + a % 2 * 2;
        score[a][tile] = largest * (1.0f / 127.0f) * (c[0] + c[1]);
      }
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
  __device__ static float LogUnit(const uint8_t* page, int row) {
    const int e = *reinterpret_cast<const uint16_t*>(page + 2 * row) & 4095;
    const float finite = float(e - 1) / 64.0f - (32.0f + 7.994353437f);  // log2(255)
    return e == 0 ? -INFINITY : e == 4095 ? NAN : finite;
  }
  // Levels are 2 code - 255.
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[2][kQTiles][2],
                             uint32_t, int lane, float (&o)[D / 16][kQTiles][4]) {
    constexpr int kRun = D / 8;
    const int g = lane / 4, t = lane % 4;
    const uint8_t* mine = page + 2 * kPageRows + g * kRun;
#pragma unroll
    for (int c = 0; c < kRun; c += 4) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t row[4];  // 8 s + t, + 16, + 4, + 20
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 8 * s + t + 16 * (i % 2) + 4 * (i / 2);
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
#pragma unroll
          for (int tile = 0; tile < kQTiles; ++tile)
            MultiplyAdd(o[(c + i) / 2][tile], a, weights[s][tile]);
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
  static constexpr int kStages = D == 256 ? 1 : 2;  // as many as fit
  __device__ static void Scores(const uint8_t* page, const Prepared<D>& queries, const float*,
                                int lane, float (&score)[4][kQTiles]) {
    const int g = lane / 4, t = lane % 4;
    float acc[2][kQTiles][4] = {};
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint2 two[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int piece = Swizzle<D>((g + 8 * a) * (D / 8) + 2 * s + t / 2);
        two[a] = *reinterpret_cast<const uint2*>(page + 16 * piece + 8 * (t % 2));
      }
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const uint2 pair = *reinterpret_cast<const uint2*>(queries.pairs[s][tile][lane]);
        const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a[4] = {two[2 * i].x, two[2 * i + 1].x, two[2 * i].y, two[2 * i + 1].y};
          MultiplyAdd(acc[i][tile], a, b);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const float* c = acc[a / 2][tile] + a % 2 * 2;
        score[a][tile] = c[0] + c[1];
      }
    }
  }
};

template <int D, int kQTiles>
struct DenseValues {
  __device__ static float LogUnit(const uint8_t*, int) { return 0.0f; }
  __device__ static void Add(const uint8_t* page, const uint32_t (&weights)[2][kQTiles][2],
                             uint32_t rows, int lane, float (&o)[D / 16][kQTiles][4]) {
    constexpr int kRun = D / 8;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < kRun; c += 8) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t row[4][4];  // rows 8 s + t, + 16, + 4, + 20: eight channels
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 8 * s + t + 16 * (i % 2) + 4 * (i / 2);
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
#pragma unroll
          for (int tile = 0; tile < kQTiles; ++tile)
            MultiplyAdd(o[(c + 2 * i) / 2][tile], a, weights[s][tile]);
        }
      }
    }
  }
};

// Shared memory of a block: this, then for each warp kStages pages of keys and values.
template <int D>
struct BlockMemory {
  Prepared<D> queries;
  float gains[2][64];  // of tiers of up to five bits, and of more: what a level of 1 stands for
  float m[kWarps][8], log_unit[kWarps][8], d[kWarps][8];
};
template <int D, int kStages>
constexpr size_t SharedBytes(size_t key_bytes, size_t value_bytes) {
  const size_t pages = kWarps * kStages * (key_bytes + value_bytes);
  const size_t merge = sizeof(float) * 8 * D;  // the outcome takes the place of the pages
  return sizeof(BlockMemory<D>) + (pages > merge ? pages : merge);
}

template <int D, bool kSwizzled>
__device__ inline void BeginCopy(const uint8_t* page, uint32_t bytes, int lane, uint8_t* to) {
  const int n = int(bytes / 16);
  for (int first = lane; first < n; first += 4 * kLanes) {
#pragma unroll
    for (int i = 0; i < 4 * kLanes; i += kLanes) {
      if (first + i < n)
        CopyAsync(to + 16 * (kSwizzled ? Swizzle<D>(first + i) : first + i),
                  page + 16 * (first + i));
    }
  }
}

template <int D, int kQTiles, typename Keys, typename Values>
__global__ void __launch_bounds__(kWarps* kLanes)
    AttendPages(Step step, Pages pages, const Prepared<D>* prepared, Share<D>* shares) {
  auto& memory = *reinterpret_cast<BlockMemory<D>*>(block_memory);
  const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int g = lane / 4, t = lane % 4;
  const int head = int(blockIdx.y) / step.n_blocks, sequence = int(blockIdx.z);
  const int entry =
      (sequence * step.kv_heads + head) * step.n_blocks + int(blockIdx.y) % step.n_blocks;

  {
    const auto* from = reinterpret_cast<const uint32_t*>(prepared + entry);
    auto* to = reinterpret_cast<uint32_t*>(&memory.queries);
    for (int i = int(threadIdx.x); i < int(sizeof(Prepared<D>) / 4); i += int(blockDim.x))
      to[i] = from[i];
    // TierGainGrid in format/log_grid.h.
    const int e = int(threadIdx.x) % 64;
    const float gain = e == 0 ? 0.0f : e == 63 ? NAN : exp2f(float(e - 1) * 0.25f - 8.0f);
    memory.gains[threadIdx.x / 64][e] = gain * (threadIdx.x < 64 ? 1.0f / 127.0f : 1.0f / 1023.0f);
  }
  __syncthreads();

  const int n_rows = pages.n_rows[sequence];
  const int n_pages = min((n_rows + kPageRows - 1) / kPageRows, pages.max_pages);
  const int every = int(gridDim.x) * kWarps;
  constexpr int kStages = Keys::kStages;
  const size_t stage_bytes = pages.key_bytes + pages.value_bytes;
  uint8_t* const stages = reinterpret_cast<uint8_t*>(block_memory) + sizeof(BlockMemory<D>) +
                          warp * kStages * stage_bytes;
  const int32_t* table = pages.table + size_t(sequence) * pages.max_pages;
  int upcoming = 0;  // the page that is copied next, known before it is needed
  const auto look_up = [&](int i) {
    if (i < n_pages) upcoming = table[i];
  };
  const auto begin = [&](int i, int stage) {
    if (i < n_pages) {
      const size_t page = size_t(upcoming) * step.kv_heads + head;
      uint8_t* to = stages + stage * stage_bytes;
      BeginCopy<D, Keys::kSwizzled>(pages.keys + page * pages.key_bytes, pages.key_bytes, lane, to);
      BeginCopy<D, Keys::kSwizzled>(pages.values + page * pages.value_bytes, pages.value_bytes,
                                    lane, to + pages.key_bytes);
    }
    EndCopyGroup();
    look_up(i + every);
  };

  float m[kQTiles], most[kQTiles], d[kQTiles];  // most: of score + log2 of the value's unit
  float o[D / 16][kQTiles][4] = {};
  for (int tile = 0; tile < kQTiles; ++tile) {
    m[tile] = most[tile] = -INFINITY;
    d[tile] = 0.0f;
  }
  constexpr float kLog2E = 1.44269504f;
  int i = int(blockIdx.x) * kWarps + warp, stage = 0;
  look_up(i);
  for (int ahead = 0; ahead < kStages - 1; ++ahead) begin(i + ahead * every, ahead);
  for (; i < n_pages; i += every) {
    begin(i + (kStages - 1) * every, (stage + kStages - 1) % kStages);
    AwaitCopies<kStages - 1>();
    __syncwarp();
    const uint8_t* key = stages + stage * stage_bytes;
    const uint8_t* value = key + pages.key_bytes;

    float score[4][kQTiles], weight[4][kQTiles];
    Keys::Scores(key, memory.queries, memory.gains[0], lane, score);
    const int left = n_rows - i * kPageRows;
    uint32_t rows = left >= kPageRows ? ~0u : (1u << left) - 1;
    if (pages.rows != nullptr) rows &= pages.rows[size_t(sequence) * pages.max_pages + i];
    float log_unit[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) log_unit[a] = Values::LogUnit(value, g + 8 * a);
#pragma unroll
    for (int tile = 0; tile < kQTiles; ++tile) {
      const float unit = memory.queries.unit[tile * kQueriesPerTile + t] * step.scale;
      float top = m[tile], top_weight = most[tile];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float s = score[a][tile] * unit;
        if (step.softcap > 0.0f) s = step.softcap * tanhf(s / step.softcap);
        const bool there = rows >> (g + 8 * a) & 1;
        s = there ? s * kLog2E : -INFINITY;
        score[a][tile] = s;
        weight[a][tile] = there ? s + log_unit[a] : -INFINITY;
        top = fmaxf(top, s == s ? s : INFINITY);  // NaN shall not get lost
        top_weight = fmaxf(top_weight, weight[a][tile]);
      }
#pragma unroll
      for (int apart = 4; apart < kLanes; apart *= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
        top_weight = fmaxf(top_weight, __shfl_xor_sync(~0u, top_weight, apart));
      }
      // Nothing seen yet: any finite maximum will do.
      const float less = top > -INFINITY ? top : 0.0f;
      const float less_weight = top_weight > -INFINITY ? top_weight : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        sum += Exp2(score[a][tile] - less);
        weight[a][tile] = Exp2(weight[a][tile] - less_weight);
      }
      d[tile] = d[tile] * Exp2(m[tile] - less) + sum;
      if (top_weight > most[tile]) {
        const float fade = Exp2(most[tile] - less_weight);
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
#pragma unroll
          for (int k = 0; k < 4; ++k) o[c][tile][k] *= fade;
        }
      }
      m[tile] = top;
      most[tile] = top_weight;
    }
    // From lanes of rows to lanes of columns.
    uint32_t pairs[2][kQTiles][2];
#pragma unroll
    for (int tile = 0; tile < kQTiles; ++tile) {
      float of_row[8];  // t, t + 4, ..
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const float w = __shfl_sync(~0u, weight[a][tile], (t + 4 * u) * 4 + g / 2);
          const float high = LowOf(PairOf(w, 0.0f));
          of_row[2 * a + u] = g % 2 == 0 ? high : w - high;
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int u = 0; u < 2; ++u)
          pairs[s][tile][u] = PairOf(of_row[2 * s + u], of_row[2 * s + u + 4]);
      }
    }
    Values::Add(value, pairs, rows, lane, o);
    __syncwarp();
    stage = (stage + 1) % kStages;
  }
  AwaitCopies<0>();

  // The four warps' outcomes become one. Lanes with the same t hold parts of d.
#pragma unroll
  for (int tile = 0; tile < kQTiles; ++tile) {
#pragma unroll
    for (int apart = 4; apart < kLanes; apart *= 2) d[tile] += __shfl_xor_sync(~0u, d[tile], apart);
    if (g == 0) {
      memory.m[warp][tile * kQueriesPerTile + t] = m[tile];
      memory.log_unit[warp][tile * kQueriesPerTile + t] = most[tile];
      memory.d[warp][tile * kQueriesPerTile + t] = d[tile];
    }
  }
  __syncthreads();
  Share<D>& share = shares[size_t(entry) * gridDim.x + blockIdx.x];
  float* sum =
      reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(block_memory) + sizeof(BlockMemory<D>));
  for (int i = int(threadIdx.x); i < 8 * D; i += int(blockDim.x)) sum[i] = 0.0f;
  __syncthreads();
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const int query = tile * kQueriesPerTile + t;
        float all = -INFINITY;
        for (int w = 0; w < kWarps; ++w) all = fmaxf(all, memory.m[w][query]);
        const float times = m[tile] > -INFINITY ? Exp2(most[tile] - all) : 0.0f;
        for (int c = 0; c < D / 16; ++c) {
          float* to = sum + query * D + g * (D / 8) + 2 * c;
          to[0] += (o[c][tile][0] + o[c][tile][1]) * times;
          to[1] += (o[c][tile][2] + o[c][tile][3]) * times;
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < 4 * kQTiles) {
    const int query = int(threadIdx.x);
    float all = -INFINITY, total = 0.0f;
    for (int w = 0; w < kWarps; ++w) all = fmaxf(all, memory.m[w][query]);
    for (int w = 0; w < kWarps; ++w) {
      if (memory.m[w][query] > -INFINITY)
        total += memory.d[w][query] * Exp2(memory.m[w][query] - all);
    }
    share.m[query] = all;
    share.d[query] = total;
  }
  for (int i = int(threadIdx.x); i < 4 * kQTiles * D; i += int(blockDim.x))
    (&share.o[0][0])[i] = sum[i];
}

// shares: of the stores one after the other, each [entry][n_shares]; a store's values are rotated
// or not.
struct ShareList {
  int n_stores;
  int n_shares[4], rotated[4];
};

// 4 D threads: four parts of the shares, each for all channels of one query.
template <int D>
__global__ void MergeShares(Step step, ShareList list, const Share<D>* shares) {
  constexpr int kParts = 4;
  __shared__ float rotated[kParts][D], plain[kParts][D], totals[kParts];
  const int thread = int(threadIdx.x), lane = thread % kLanes;
  const int channel = thread % D, part = thread / D;
  const int head = int(blockIdx.y) / step.n_blocks, block = int(blockIdx.y) % step.n_blocks;
  const int query = int(blockIdx.x);
  if (8 * block + query >= step.group) return;
  const int entry = int(blockIdx.z) * step.kv_heads + head, slot = entry * step.n_blocks + block;
  const int n_slots = int(gridDim.z) * step.kv_heads * step.n_blocks;

  float all = -INFINITY;
  const Share<D>* store = shares;
  for (int i = 0; i < list.n_stores; ++i) {
    const Share<D>* mine = store + size_t(slot) * list.n_shares[i];
    for (int s = lane; s < list.n_shares[i]; s += kLanes) all = fmaxf(all, mine[s].m[query]);
    store += size_t(n_slots) * list.n_shares[i];
  }
  for (int apart = 1; apart < kLanes; apart *= 2)
    all = fmaxf(all, __shfl_xor_sync(~0u, all, apart));

  float total = 0.0f, sums[2] = {0.0f, 0.0f};
  store = shares;
  for (int i = 0; i < list.n_stores; ++i) {
    const Share<D>* mine = store + size_t(slot) * list.n_shares[i];
    float sum = 0.0f;
#pragma unroll 4
    for (int s = part; s < list.n_shares[i]; s += kParts) {
      const float m = mine[s].m[query];
      const float times = m > -INFINITY ? Exp2(m - all) : 0.0f;
      total += mine[s].d[query] * times;
      sum += mine[s].o[query][channel] * times;
    }
    sums[list.rotated[i]] += sum;
    store += size_t(n_slots) * list.n_shares[i];
  }
  plain[part][channel] = sums[0];
  rotated[part][channel] = sums[1];
  if (channel == 0) totals[part] = total;
  __syncthreads();
  if (part == 0) {
    for (int p = 1; p < kParts; ++p) {
      plain[0][channel] += plain[p][channel];
      rotated[0][channel] += rotated[p][channel];
    }
  }
  RotateTogether<D>(rotated[0], thread, kParts * D, D, [] { __syncthreads(); });
  if (part != 0) return;
  total = totals[0] + totals[1] + totals[2] + totals[3];
  const float sum = rotated[0][channel] * rsqrtf(float(D)) + plain[0][channel];
  float* out = step.out + (size_t(entry) * step.group + 8 * block + query) * D;
  out[channel] = total == 0.0f ? 0.0f : sum / total;
}

}  // namespace sparkv::gpu

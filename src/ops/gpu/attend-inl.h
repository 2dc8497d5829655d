// Attention of one query token per sequence over packed pages, for a whole layer at once. Three
// kernels:
//   PrepareQueries  a head's queries in the form that its keys meet, in the order that lanes read
//   AttendPages     a share of a sequence's pages per warp -> (o, m, d) per block
//   MergeShares     all shares of all stores -> the answer, values turned back from their rotation
// Rows are multiplied as they lie: codes become levels in registers, levels meet the queries in the
// matrix unit. Its eight columns take four queries, a number as two parts, which costs nothing,
// since a group has few queries, and gives f16 and byte products the accuracy of f32:
//   codes of up to four bits   levels are bytes, looked up; a query is three digits, a weight two
//   more bits                  levels are f16; queries and weights are f16(x) and f16(x - f16(x))
#pragma once

#include "base/half.h"
#include "format/page_layout.h"
#include "format/trellis.h"
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

// Tiers of so many bits or fewer are multiplied as bytes.
inline constexpr int kMostByteBits = 3;

// What a head's queries became. One per sequence, KV head and block of queries.
template <int D>
struct Prepared {
  uint32_t b[D / 16][kMostTiles][kLanes][2];  // what lanes hold of queries, by steps of 16 numbers
  float unit[8];                              // scale of a query's numbers
  int32_t bits[kTiers];
};

// One share's outcome for eight queries; o in units of 2^m.
template <int D>
struct Share {
  float m[8], d[8];
  float o[8][D];
};

// Of word j of a tier lane t of four multiplies numbers m = t, t + 4, t + 8 and t + 12: the i-th
// here.
template <int D>
__device__ inline int NumberOf(int tier, int j, int t, int i) {
  constexpr int kPerTier = D / kTiers;
  return tier * kPerTier + j + kPerTier / 16 * (t + 4 * i);
}

// The whole number nearest to x, |x| <= 1, in units of 1 / kDigitsOne, as digits to the base 256
// from -128 to 127: 0 the highest.
inline constexpr float kDigitsOne = 127.0f * 65536.0f;
__device__ inline int DigitOf(float x, int which) {
  const int whole = __float2int_rn(x * kDigitsOne);
  const int high = (whole + 32896) >> 16, rest = whole - high * 65536;
  const int middle = (rest + 128) >> 8;
  return which == 0 ? high : which == 1 ? middle : rest - middle * 256;
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
  if (thread == 0 && tiers) {  // seen by all below
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
    const int word = i % 2, t = i / 2 % 4, low = i / 8 % 2, s = i / 16;
    uint32_t held = 0;
    constexpr int kWords = D / 64;  // of a tier, one per step
    const int tier = s / kWords, step_of_tier = s % kWords;
    if (tiers && to.bits[tier] <= kMostByteBits) {
      // Two products of two words each: digits 0 and 1, then 2. A single word: both in one entry.
      const int second = kWords == 1 ? word : step_of_tier % 2;
      const int j = kWords == 1 ? 0 : step_of_tier / 2 * 2 + word;
      for (int n = 0; n < 4 && 2 * second + low < 3; ++n) {
        const int digit = DigitOf(x[NumberOf<D>(tier, j, t, n)] / unit, 2 * second + low);
        held |= uint32_t(digit & 255) << (8 * n);
      }
    } else {
      float part[2];
      for (int half = 0; half < 2; ++half) {
        const int number = tiers ? NumberOf<D>(tier, step_of_tier, t, 2 * word + half)
                                 : 16 * s + 4 * t + 2 * word + half;
        const float value = x[number] / unit, high = LowOf(PairOf(value, 0.0f));
        part[half] = low == 0 ? high : value - high;
      }
      held = PairOf(part[0], part[1]);
    }
    const int column = warp % kQueriesPerTile * 2 + low;
    to.b[s][warp / kQueriesPerTile][4 * column + t][word] = held;
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

// The same for codes of up to four bits as signed bytes: out[i]: numbers 4 i .. 4 i + 3. Of four
// bits the levels below zero come apart, as magnitudes in `below`: a byte permutation looks up
// eight.
template <int kBits>
constexpr uint32_t FourLevels(int first, bool below) {
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    const int code = first + i, half = 1 << kBits;
    int level = 0;
    if (code < half) level = TrellisMagnitude(kBits, half - 1 - code) * (below ? 1 : -1);
    if (code >= half && code < 2 * half) level = TrellisMagnitude(kBits, code - half);
    four |= uint32_t(level & 255) << (8 * i);
  }
  return four;
}
template <int kBits>
__device__ inline void ByteLevels(const uint32_t (&plane)[kBits + 1], int t, uint32_t (&out)[2],
                                  uint32_t (&below)[2]) {
  static_assert(kBits <= kMostByteBits);
  uint32_t code = 0;
#pragma unroll
  for (int k = 0; k <= kBits; ++k)
    code |= __funnelshift_l(plane[k], plane[k], (k - t) & 31) & (0x11111111u << k);
  constexpr bool kApart = kBits == kMostByteBits;
  constexpr uint32_t kLow = FourLevels<kBits>(0, kApart), kNext = FourLevels<kBits>(4, kApart);
  if constexpr (!kApart) {
    out[0] = PickBytes(kLow, kNext, code);
    out[1] = PickBytes(kLow, kNext, code >> 16);
  } else {
    // A selector with its highest bit set gives the byte's highest bit eight times: 0, as
    // magnitudes have.
    constexpr uint32_t kThird = FourLevels<kBits>(8, true), kLast = FourLevels<kBits>(12, true);
    const uint32_t turned = code ^ 0x88888888u;
    out[0] = PickBytes(kThird, kLast, turned);
    out[1] = PickBytes(kThird, kLast, turned >> 16);
    below[0] = PickBytes(kLow, kNext, code);
    below[1] = PickBytes(kLow, kNext, code >> 16);
  }
}

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
          for (int s = 0; s < 4; s += 2) {
            const uint32_t a[4] = {level[0][s], level[1][s], level[0][s + 1], level[1][s + 1]};
#pragma unroll
            for (int tile = 0; tile < kQTiles; ++tile) {
              const uint32_t b[2] = {weights[tile][s], weights[tile][s + 1]};
              MultiplyAdd(sums[tile], a, b);
            }
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
        const uint2 pair = *reinterpret_cast<const uint2*>(queries.b[s][tile][lane]);
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
          for (int tile = 0; tile < kQTiles; ++tile) {
            const uint32_t b[2] = {weights[tile][2 * s], weights[tile][2 * s + 1]};
            MultiplyAdd(o[(c + i) / 2][tile], a, b);
          }
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
      uint2 two[4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int piece = Swizzle<D>((g + 8 * a) * (D / 8) + 2 * s + t / 2);
        two[a] = *reinterpret_cast<const uint2*>(page + 16 * piece + 8 * (t % 2));
      }
#pragma unroll
      for (int tile = 0; tile < kQTiles; ++tile) {
        const uint2 pair = *reinterpret_cast<const uint2*>(queries.b[s][tile][lane]);
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
          for (int tile = 0; tile < kQTiles; ++tile) {
            const uint32_t b[2] = {weights[tile][2 * s], weights[tile][2 * s + 1]};
            MultiplyAdd(o[(c + 2 * i) / 2][tile], a, b);
          }
        }
      }
    }
  }
};

// Shared memory of a block: this, then for each warp kStages pages of keys and values.
template <int D>
struct BlockMemory {
  Prepared<D> queries;
  // What a sum of a tier's products stands for: of bytes and digits, of f16 up to five bits, of
  // more.
  float gains[3][64];
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
__global__ void __launch_bounds__(kWarps* kLanes, Keys::kBlocks)
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
    if (threadIdx.x < 64) {
      memory.gains[0][e] = gain / (127.0f * kDigitsOne);
      memory.gains[1][e] = gain / 127.0f;
    } else {
      memory.gains[2][e] = gain / 1023.0f;
    }
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
  float o[D / 16][kQTiles][Values::kSums] = {};
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

    float score[4][kQTiles], weight[4][kQTiles], fold[kQTiles];
    Keys::Scores(key, memory.queries, memory.gains[0], lane, score);
    const int left = n_rows - i * kPageRows;
    uint32_t rows = left >= kPageRows ? ~0u : (1u << left) - 1;
    if (pages.rows != nullptr) rows &= pages.rows[size_t(sequence) * pages.max_pages + i];
    float log_unit[4];
#pragma unroll
    for (int a = 0; a < 4; ++a) log_unit[a] = Values::LogUnit(value, g + 8 * a);
    bool lost = false;  // a weight that is no number
#pragma unroll
    for (int tile = 0; tile < kQTiles; ++tile) {
      const float unit = memory.queries.unit[tile * kQueriesPerTile + t] * step.scale;
      float top = m[tile], page_top = -INFINITY;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float s = score[a][tile] * unit;
        if (step.softcap > 0.0f) s = step.softcap * tanhf(s / step.softcap);
        const bool there = rows >> (g + 8 * a) & 1;
        s = there ? s * kLog2E : -INFINITY;
        score[a][tile] = s;
        weight[a][tile] = there ? s + log_unit[a] : -INFINITY;
        lost |= weight[a][tile] != weight[a][tile];
        top = fmaxf(top, s == s ? s : INFINITY);  // NaN shall not get lost
        page_top = fmaxf(page_top, weight[a][tile]);
      }
#pragma unroll
      for (int apart = 4; apart < kLanes; apart *= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
        page_top = fmaxf(page_top, __shfl_xor_sync(~0u, page_top, apart));
      }
      const float all_top = fmaxf(most[tile], page_top);
      // Nothing seen yet: any finite maximum will do.
      const auto finite = [](float x) { return x > -INFINITY ? x : 0.0f; };
      const float less = finite(top), less_weight = finite(Values::kBytes ? page_top : all_top);
      float sum = 0.0f;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        sum += Exp2(score[a][tile] - less);
        weight[a][tile] = Exp2(weight[a][tile] - less_weight);
      }
      d[tile] = d[tile] * Exp2(m[tile] - less) + sum;
      fold[tile] = Exp2(page_top - finite(all_top)) * (1.0f / kWeightOne);
      if (page_top > most[tile]) {
        const float fade = Exp2(most[tile] - all_top);
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
#pragma unroll
          for (int k = 0; k < Values::kSums; ++k) o[c][tile][k] *= fade;
        }
      }
      m[tile] = top;
      most[tile] = all_top;
    }
    if (Values::kBytes && __any_sync(~0u, lost)) {
      for (int tile = 0; tile < kQTiles; ++tile) fold[tile] = NAN;
    }
    // From lanes of rows to lanes of columns.
    uint32_t held[kQTiles][4];
#pragma unroll
    for (int tile = 0; tile < kQTiles; ++tile) {
      float of_row[8];  // t, t + 4, ..
#pragma unroll
      for (int n = 0; n < 8; ++n)
        of_row[n] = __shfl_sync(~0u, weight[n / 2][tile], (t + 4 * (n % 2)) * 4 + g / 2);
      HoldWeights<Values::kBytes>(of_row, g % 2 != 0, held[tile]);
    }
    Values::Add(value, held, fold, rows, lane, o);
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
          for (int r = 0; r < 2; ++r) {
            const float* part = o[c][tile] + r * (Values::kSums / 2);
            to[r] += (Values::kSums == 4 ? part[0] + part[1] : part[0]) * times;
          }
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

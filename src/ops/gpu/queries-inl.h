// A step as kernels see it, and a head's queries in the form that its keys meet, in the order that
// lanes read.
#pragma once

#include "base/half.h"
#include "format/page_layout.h"
#include "ops/gpu/levels-inl.h"

namespace sparkv::gpu {

inline constexpr int kWarps = 4, kLanes = 32;
inline constexpr int kQueriesPerTile = 4;  // columns of a product / 2
inline constexpr int kMostStores = 4;
inline constexpr int kMostTiles = 2;  // so eight queries share what is unpacked

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
  uint32_t b[D / 16][kMostTiles][kLanes][2];  // what lanes hold of queries, by steps of 16 numbers
  float unit[8];                              // scale of a query's numbers
  int32_t bits[kTiers];
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

struct Stores {
  Pages pages[kMostStores];
};

// Of each store (x) and entry. 256 threads, a warp for each of eight queries.
template <int D>
__global__ void PrepareQueries(Step step, Stores stores, Prepared<D>* out) {
  __shared__ float rows[8][D];
  __shared__ uint16_t weights[D];
  __shared__ int place[D];           // where a channel lies in the order of the tiers
  __shared__ int counts[kTiers][8];  // channels of a tier among 32
  const int thread = int(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int head = int(blockIdx.y) / step.n_blocks, block = int(blockIdx.y) % step.n_blocks;
  const int entry = int(blockIdx.z) * step.kv_heads + head;
  const Pages& pages = stores.pages[blockIdx.x];
  const size_t n_slots = size_t(gridDim.y) * gridDim.z;
  Prepared<D>& to = out[blockIdx.x * n_slots + size_t(entry) * step.n_blocks + block];
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
  for (int j = lane; j < D; j += kLanes) {
    const float size = fabsf(x[j]);
    most = fmaxf(most, size == size ? size : INFINITY);  // NaN shall not get lost
  }
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

}  // namespace sparkv::gpu

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

#include "ops/gpu/rows-inl.h"

namespace sparkv::gpu {

// One share's outcome for eight queries; o in units of 2^m.
template <int D>
struct Share {
  float m[8], d[8];
  float o[8][D];
};

// Shared memory of a block: this, then for each warp kStages pages of keys and values.
template <int D>
struct BlockMemory {
  Prepared<D> queries;
  // What a sum of a tier's products stands for: of bytes and digits, of f16 up to five bits, of
  // more.
  float gains[3][64];
  float m[kWarps][8], d[kWarps][8];
};
template <int D>
constexpr size_t SharedBytes(int stages, size_t key_bytes, size_t value_bytes) {
  const size_t pages = size_t(kWarps * stages) * (key_bytes + value_bytes);
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
  const int n_pages = min(n_rows / kPageRows + (n_rows % kPageRows > 0), pages.max_pages);
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
    if (i < n_pages && upcoming >= 0) {
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
  int n_shares[kMostStores], rotated[kMostStores];
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

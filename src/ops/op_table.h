// The functions of one device on one instruction set. The cache calls nothing else on rows, so that another device can bring
// its own table. Raw pointers and layouts only: no models, layers or sequences.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/row_layout.h"

namespace sparkv {

// Columns of one attention tile: cells 64t .. 64t+63 of a stream, or 64 dense rows.
inline constexpr int kTile = 64;

// A place in memory for each of the 64 rows of a tile of one head; row i is read only when bit i of `rows` is set.
struct PackedTile {
  uint64_t rows = 0;
  const uint8_t* key[kTile];
  const uint8_t* value[kTile];
  const float* table[kTile];  // KeyWeights the key was packed with; not read when the layout needs none
};

struct DenseTile {
  uint64_t rows = 0;
  const uint16_t* key[kTile];    // f16 [k_dim]
  const uint16_t* value[kTile];  // f16 [v_dim]
};

// Attention of n query rows over some tiles, carried as (o, m, d): o = sum of e^(s-m) v, m = largest score, d = sum e^(s-m).
struct AttentionState {
  float* o;  // [n][o_stride], o_stride = v_dim padded to 16
  float* m;  // [n]
  float* d;  // [n]
};

// Queries of one KV head that see one set of tiles together. Rows are token-major: row = token * group + g.
struct QueryBlock {
  const float* q;        // [n_rows][q_stride], not scaled
  size_t q_stride;       // floats
  int n_rows, group;
  int k_dim, v_dim, o_stride;
  float scale, softcap;  // score = scale * qk, then softcap * tanh(score / softcap) when softcap > 0
  const float* slope;    // [group] ALiBi slopes, or NULL when the mask only hides
};

struct Scratch {
  float* key_rows;  // [64][k_dim padded to 16]
  float* key_cols;  // [k_dim padded to 16][64]
  float* value;     // [64][v_dim padded to 16]
  float* score;     // [kScoreRows][64]
};
inline constexpr int kScoreRows = 8;
// Rows are padded to 16 floats; the padding must start as zeros.
static inline size_t ScratchFloats(int k_dim, int v_dim) {
  return size_t(kTile) * size_t(2 * (k_dim + 15) + v_dim + 15 + kScoreRows) + 64;
}

struct OpTable {
  const char* name;

  // One row of one head. k, v: f16. table: KeyWeights, NULL when not needed.
  void (*pack_key)(const KeyLayout& layout, const float* table, const uint16_t* k, uint8_t* row);
  void (*pack_value)(const ValueLayout& layout, const uint16_t* v, uint8_t* row);
  // Back to f16, value rotation undone. The same bits on every instruction set.
  void (*unpack_key)(const KeyLayout& layout, const float* table, const uint8_t* row, uint16_t* k);
  void (*unpack_value)(const ValueLayout& layout, const uint8_t* row, uint16_t* v);

  // state (+)= attention of the block over one tile. visible: [n_tokens] bits of the tile's columns each token sees, a subset
  // of tile.rows; mask: per token f16 mask values of the 64 columns (only read when block.slope is set).
  // Packed values add to o in the rotated basis.
  void (*attend_packed)(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block, const PackedTile& tile,
                        const uint64_t* visible, const uint16_t* const* mask, const Scratch& scratch,
                        const AttentionState& state);
  void (*attend_dense)(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                       const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state);
};

// The table for a wish; AUTO gives the best this CPU has, another wish that the CPU lacks gives NULL.
const OpTable* CpuOps(sparkv_simd wish);

}  // namespace sparkv

// The functions of one device on one instruction set. The cache calls nothing else on rows, so that
// another device can bring its own table. Raw pointers and layouts only: no models, layers or
// sequences.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/row_layout.h"

namespace sparkv {

// Columns of one attention tile: cells 64t .. 64t+63 of a stream, or 64 dense rows.
inline constexpr int kTile = 64;

// 64 rows of one head in runs of 16: row i is at [i / 16] + (i % 16) * bytes of its layout. Rows
// whose bit in `rows` is clear are not used; a run without any is not touched. Memory may be read
// up to 128 bytes past a row.
struct PackedTile {
  uint64_t rows = 0;
  const uint8_t* key[kTile / 16];
  const uint8_t* value[kTile / 16];
  const float* table;  // KeyWeights the keys were packed with; not read when the layout needs none
  // Runs of `next_bytes` that are read next, if any. A kernel prefetches them a few at a time: all
  // at once they would keep it from its own rows.
  const uint8_t* next[kTile / 16];
  size_t next_bytes = 0;
};

struct DenseTile {
  uint64_t rows = 0;
  const uint16_t* key[kTile];    // f16 [k_dim]
  const uint16_t* value[kTile];  // f16 [v_dim]
};

// Attention of n query rows over some tiles, carried as (o, m, d): o = sum of e^(s-m) v, m =
// largest score, d = sum e^(s-m).
struct AttentionState {
  float* o;  // [n][o_stride], o_stride = v_dim padded to 16
  float* m;  // [n]
  float* d;  // [n]
};

// Queries of one KV head that see one set of tiles together. Rows are token-major: row = token *
// group + g.
struct QueryBlock {
  const float* q;   // [n_rows][q_stride], not scaled
  size_t q_stride;  // floats
  int n_rows, group;
  int k_dim, v_dim, o_stride;
  float scale,
      softcap;         // score = scale * qk, then softcap * tanh(score / softcap) when softcap > 0
  const float* slope;  // [group] ALiBi slopes, or NULL when the mask only hides
};

struct Scratch {
  float* key_rows;  // [64][k_dim padded to 16]
  float* key_cols;  // [k_dim padded to 16][64]
  float* value;     // [64][v_dim padded to 16]
  float* score;     // [kScoreRows][64]
  float* queries;   // queries as prepare_queries left them
  float* operands;  // rows of a tile as matrix instructions take them: two bf16 for each number,
                    // keys padded to 32 channels and values to 16
  float* weights;   // [n_rows padded to 16][64], of all query rows: what matrix instructions leave
  float* places;    // [kPlaceFloats] where prepare_queries found codes of keys to be
};
inline constexpr int kScoreRows = 8, kPlaceFloats = 32;
static inline size_t PadTo16(int n) { return size_t(n + 15) & ~size_t{15}; }
// Floats of prepared queries: two vectors of 24-bit numbers, in 64-channel pieces, and sixteen
// numbers per row; matrix instructions take sixteen rows together.
static inline size_t QueryFloats(int k_dim, size_t n_rows) {
  return PadTo16(int(n_rows)) * (size_t((k_dim + 63) / 64) * 96 + 16);
}
static inline size_t OperandFloats(int k_dim, int v_dim) {
  return size_t(kTile) * (size_t(k_dim + 31) / 32 * 32 + PadTo16(v_dim));
}
static inline size_t WeightFloats(size_t n_rows) { return PadTo16(int(n_rows)) * size_t(kTile); }
// Rows are padded to 16 floats; the padding must start as zeros. `floats` is aligned to 64 bytes.
static inline size_t ScratchFloats(int k_dim, int v_dim, size_t n_rows) {
  return size_t(kTile) * (2 * PadTo16(k_dim) + PadTo16(v_dim) + kScoreRows) +
         OperandFloats(k_dim, v_dim) + WeightFloats(n_rows) + kPlaceFloats +
         QueryFloats(k_dim, n_rows);
}
static inline Scratch MakeScratch(float* floats, int k_dim, int v_dim, size_t n_rows) {
  Scratch s;
  s.key_rows = floats;
  s.key_cols = s.key_rows + size_t(kTile) * PadTo16(k_dim);
  s.value = s.key_cols + size_t(kTile) * PadTo16(k_dim);
  s.score = s.value + size_t(kTile) * PadTo16(v_dim);
  s.operands = s.score + size_t(kScoreRows) * kTile;
  s.weights = s.operands + OperandFloats(k_dim, v_dim);
  s.places = s.weights + WeightFloats(n_rows);
  s.queries = s.places + kPlaceFloats;
  return s;
}

struct OpTable {
  const char* name;

  // Rows of one layout, of any tokens and heads; sixteen together cost little more than one. k, v:
  // f16 [n_rows][head_dim]. tables: KeyWeights of each row, NULL when not needed.
  void (*pack_keys)(const KeyLayout& layout, int n_rows, const float* const* tables,
                    const uint16_t* const* k, uint8_t* const* rows);
  void (*pack_values)(const ValueLayout& layout, int n_rows, const uint16_t* const* v,
                      uint8_t* const* rows);
  // Back to f16, value rotation undone. The same bits on every instruction set.
  void (*unpack_key)(const KeyLayout& layout, const float* table, const uint8_t* row, uint16_t* k);
  void (*unpack_value)(const ValueLayout& layout, const uint8_t* row, uint16_t* v);

  // Puts the queries of a block into the form that attend_packed reads beside keys of this layout
  // and table, or attend_dense beside f16 ones; called before it whenever one of them has changed.
  void (*prepare_queries)(const KeyLayout& layout, const float* table, const QueryBlock& block,
                          const Scratch& scratch);
  // state (+)= attention of the block over one tile. visible: [n_tokens] bits of the tile's columns
  // each token sees, a subset of tile.rows; mask: per token f16 mask values of the 64 columns (only
  // read when block.slope is set). Packed values add to o in the rotated basis.
  void (*attend_packed)(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                        const PackedTile& tile, const uint64_t* visible,
                        const uint16_t* const* mask, const Scratch& scratch,
                        const AttentionState& state);
  void (*attend_dense)(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                       const uint16_t* const* mask, const Scratch& scratch,
                       const AttentionState& state);
};

// The table for a wish; AUTO gives the best this CPU has, another wish that the CPU lacks gives
// NULL.
const OpTable* CpuOps(sparkv_simd wish);

}  // namespace sparkv

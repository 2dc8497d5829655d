// Where rows of a cache lie: sizes and offsets that follow from configuration and shape alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "config/recent.h"
#include "format/row_layout.h"

namespace sparkv {

// Packed rows are stored in groups of 16 cells that hold all layers: group g of a stream holds, for
// each layer and KV head, 16 key rows and then 16 value rows. So a cell's row is found by
// arithmetic, and memory grows with tokens, a few pages at a time, whatever the number of layers.
inline constexpr int64_t kGroupCells = 16;
inline constexpr int32_t kTogether = 4;  // tokens whose rows are trellis-coded at once

// Rows of a stage in its slots.
struct StageLayout {
  KeyLayout key;
  ValueLayout value;
  size_t at = 0;  // byte offset in a slot
  size_t bytes(int n_kv_heads) const { return size_t(n_kv_heads) * (key.bytes + value.bytes); }
};

// Keys and values of a stage in a layer whose packed rows are `key` and `value`: never fewer bytes
// than those, and no tiers where packed keys have weights of another kind.
inline KeyLayout StageKey(const RecentStage& stage, const KeyLayout& key) {
  const KeyLayout own =
      KeyLayout::Make(key.head_dim, key.head_dim, stage.kept, SPARKV_RECOVER_ZERO);
  return key.bytes >= own.bytes || (own.tiered() && !key.tiered()) ? key : own;
}
inline ValueLayout StageValue(const RecentStage& stage, const ValueLayout& value) {
  const ValueLayout own = ValueLayout::Make(value.head_dim, stage.values);
  return value.bytes >= own.bytes ? value : own;
}

struct LayerLayout {
  int n_kv_heads = 0;
  int32_t number = 0;  // in the model
  KeyLayout key;
  ValueLayout value;
  std::vector<StageLayout> stages;  // 0: the window, f16
  // Key rows of a stage; behind the last one: packed rows.
  const KeyLayout& key_of(int stage) const {
    return size_t(stage) < stages.size() ? stages[size_t(stage)].key : key;
  }
  int k_dim() const { return key.head_dim; }
  int v_dim() const { return value.head_dim; }
  size_t k_row() const { return size_t(n_kv_heads) * size_t(key.head_dim); }  // numbers per token
  size_t v_row() const { return size_t(n_kv_heads) * size_t(value.head_dim); }
  size_t head_group_bytes() const { return size_t(kGroupCells) * (key.bytes + value.bytes); }

  size_t packed_at = 0;    // byte offset in a group
  size_t channel_at = 0;   // offset in an observation row, channels
  size_t head_at = 0;      // heads of the layers before it
  bool has_table = false;  // weights, or a baseline's channels, of its own
  size_t table_at = 0;     // offset in a weight table, f16 numbers [n_kv_heads][k_dim]
  size_t table_row() const {
    return size_t(n_kv_heads) * size_t(kWeightParts) * size_t(key.head_dim);
  }  // f32, expanded
};

struct CacheLayout {
  std::vector<LayerLayout> layers;
  int64_t cells_per_stream = 0;
  int n_streams = 0;
  size_t group_bytes = 0;
  std::vector<int32_t> until;      // per stage: rows of it are less than that many tokens old
  std::vector<int32_t> together;   // per stage: how many tokens leave it at once
  int32_t sinks = 0;               // tokens of a sequence that stay in the first
  std::vector<size_t> slot_bytes;  // per stage
  size_t heads = 0;                // KV heads of all layers
  size_t channels = 0;             // of an observation row
  size_t table_numbers = 0;        // of a weight table

  int64_t cells() const { return cells_per_stream * n_streams; }
  int n_stages() const { return int(until.size()); }
  // The stage in which the query of token `query` of a sequence finds the row of its token `rank`,
  // n_stages(): packed. Tokens that leave a stage together are as old as the first of them.
  int StageOf(int32_t query, int32_t rank) const {
    int s = 0;
    for (; rank >= sinks && s < n_stages(); ++s) {
      const int32_t first = rank - (rank - sinks) % together[size_t(s)];
      if (query - first < until[size_t(s)]) break;
    }
    return s;
  }
  int64_t groups_per_stream() const { return (cells_per_stream + kGroupCells - 1) / kGroupCells; }
  int64_t words_per_stream() const { return (cells_per_stream + 63) / 64; }
  int64_t stream_of(int64_t cell) const { return cell / cells_per_stream; }
  int64_t index_of(int64_t cell) const { return cell % cells_per_stream; }
  int64_t group_of(int64_t cell) const {
    return stream_of(cell) * groups_per_stream() + index_of(cell) / kGroupCells;
  }

  size_t key_at(const LayerLayout& layer, int head, int64_t cell) const {
    return size_t(group_of(cell)) * group_bytes + layer.packed_at +
           size_t(head) * layer.head_group_bytes() +
           size_t(index_of(cell) % kGroupCells) * layer.key.bytes;
  }
  size_t value_at(const LayerLayout& layer, int head, int64_t cell) const {
    return size_t(group_of(cell)) * group_bytes + layer.packed_at +
           size_t(head) * layer.head_group_bytes() + size_t(kGroupCells) * layer.key.bytes +
           size_t(index_of(cell) % kGroupCells) * layer.value.bytes;
  }
};

}  // namespace sparkv

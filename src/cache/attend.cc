// One attention call: which tiles, which queries together, which thread. Work is cut by shape and
// by what queries see, never by the number of threads, so results do not depend on it.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "cache/kv_cache.h"
#include "cache/visible.h"
#include "ops/hadamard.h"

namespace sparkv {
namespace {

constexpr int64_t kSplitTiles = 32;     // tiles per task when there are few queries
constexpr int64_t kFewRecentTiles = 4;  // of recent rows, which need no task of their own
// Below this many multiply-adds a loop ends before a sleeping thread, or one of the host's team
// that waits for its next loop, has begun.
constexpr double kWorthWaking = 3e6, kWorthSharing = 2e5;

// Calls body(table, rows) for each set of weights among the rows of a tile: bits `rows` of `any`.
template <typename TableOf, typename Body>
void EachTable(uint64_t any, TableOf&& table_of, Body&& body) {
  while (any != 0) {
    const uint16_t id = table_of(std::countr_zero(any));
    uint64_t rows = 0;
    ForEachBit(&any, 1, [&](int64_t i) {
      if (table_of(i) == id) rows |= uint64_t{1} << i;
    });
    body(id, rows);
    any &= ~rows;
  }
}

}  // namespace

Status KvCache::Attend(const sparkv_attend_args& args) {
  EndRestore();
  copy_ = {};
  if (step_.open && !step_.planned && arena_layer_ != args.layer &&
      layer_written_[size_t(args.layer)] != 0) {
    return Status::Invalid("layer: " + std::to_string(args.layer) +
                           " was written before another layer was attended");
  }
  if (!ViewHolds(args)) {
    if (Status s = Look(args); !s.ok()) return s;
  }
  const bool first =
      step_.open && layer_done_[size_t(args.layer)] == 0 && arena_layer_ == args.layer;
  if (first) {
    if (model_ == Model::kOther) return TellModel();
    if (model_ != Model::kTold) CountEnergies(args);
    if (!errors_.empty()) CountQueries(args);
    MakeTables(args);
    KeepQueries(args);
  }
  // No tile asks for weights while all rows are f16.
  if (n_sealed_ > 0 || n_evicted_ > 0 || n_dense_ > in_stage_[0] || !step_.aging.empty())
    ExpandTables(args.layer);
  if (first) SealLayer(args.layer);
  AttendLayer(args);
  if (first) {
    EvictLayer(args);
    KeepDense(args.layer);
    layer_done_[size_t(args.layer)] = 1;
    if (std::all_of(layer_done_.begin(), layer_done_.end(), [](uint8_t done) { return done != 0; }))
      FinishStep();
  }
  return first && model_ == Model::kUntold ? TellModel() : Status::Ok();
}

void KvCache::AttendLayer(const sparkv_attend_args& args) {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  const int group = args.n_heads / layer.n_kv_heads;
  const int k_dim = layer.k_dim(), v_dim = layer.v_dim();
  const size_t o_stride = PadTo16(v_dim);
  const bool few = args.n_tokens <= kFewTokens;
  const int64_t block_tokens = std::min(args.n_tokens, view_.block_tokens);
  const int64_t n_blocks = (args.n_tokens + block_tokens - 1) / block_tokens;
  const int64_t n_tiles = int64_t(view_.packed.words), n_apart = int64_t(view_.apart.words);
  // Parts of the packed cells, and all recent rows as one more.
  const int64_t n_packed_splits =
      few ? std::max<int64_t>(1, (n_tiles + kSplitTiles - 1) / kSplitTiles) : 1;
  const bool recent_split =
      few && layout_.n_stages() > 1 && int64_t(view_.stages[0].words) > kFewRecentTiles;
  const int64_t n_splits = n_packed_splits + (recent_split ? 1 : 0);
  const size_t block_rows = size_t(block_tokens) * size_t(group);

  std::vector<float> slopes;
  if (args.max_bias > 0.0f || view_.mask_values) {
    slopes.assign(size_t(args.n_heads), 1.0f);
    if (args.max_bias > 0.0f) {
      const int power = 1 << int(std::floor(std::log2(double(args.n_heads))));
      const float m0 = std::pow(2.0f, -args.max_bias / float(power)),
                  m1 = std::pow(2.0f, -args.max_bias / 2.0f / float(power));
      for (int h = 0; h < args.n_heads; ++h) {
        slopes[size_t(h)] =
            h < power ? std::pow(m0, float(h + 1)) : std::pow(m1, float(2 * (h - power) + 1));
      }
    }
  }

  const double work = double(args.n_streams) * double(args.n_tokens) * double(args.n_heads) *
                      double(args.n_kv) * double(k_dim + v_dim);
  const int n_threads = work < (pool_.own() ? kWorthWaking : kWorthSharing) ? 1 : pool_.size();
  const size_t kernel_floats = ScratchFloats(k_dim, v_dim, block_rows);
  // A tile of rows that were copied together, and what kernels may read past it.
  size_t row_bytes = layer.key.bytes + layer.value.bytes;
  for (const StageLayout& rows : layer.stages)
    row_bytes = std::max<size_t>(row_bytes, rows.key.bytes + rows.value.bytes);
  const size_t tile_bytes = size_t(kTile) * row_bytes + 128;
  const size_t scratch_floats =
      kernel_floats + block_rows * (size_t(k_dim) + o_stride + 2) + tile_bytes / sizeof(float) + 16;
  if (thread_space_.size() < size_t(n_threads)) thread_space_.resize(size_t(n_threads));
  for (auto& space : thread_space_) {
    if (space.size() < scratch_floats) space.assign(scratch_floats, 0.0f);
  }
  // A split task leaves its state here: [stream][head][split][rows][o_stride + 2].
  const size_t state_floats = block_rows * (o_stride + 2);
  if (n_splits > 1)
    partial_.resize(size_t(args.n_streams) * size_t(layer.n_kv_heads) * size_t(n_splits) *
                    state_floats);

  const auto query_block = [&](int head, int64_t n_rows, const float* q) {
    QueryBlock block{};
    block.q = q;
    block.q_stride = size_t(k_dim);
    block.n_rows = int(n_rows);
    block.group = group;
    block.k_dim = k_dim;
    block.v_dim = v_dim;
    block.o_stride = int(o_stride);
    block.scale = args.scale;
    block.softcap = args.softcap;
    block.slope = slopes.empty() ? nullptr : slopes.data() + size_t(head) * size_t(group);
    return block;
  };
  const auto mask_row = [&](int stream, int64_t token) {
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<const uint8_t*>(args.mask) +
                                             size_t(stream) * args.mask_stream_stride +
                                             size_t(token) * args.mask_token_stride);
  };

  // Scratch of a thread: kernels' scratch | queries of the block | state | rows of a tile.
  struct Space {
    Scratch scratch;
    float* q;
    float* state;
    uint8_t* rows;
    Prepared* prepared;
  };
  prepared_.assign(size_t(n_threads), {});
  const auto space_of = [&](int thread) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(thread_space_[size_t(thread)].data());
    float* p = reinterpret_cast<float*>((at + 63) & ~uintptr_t{63});
    Space s;
    s.scratch = MakeScratch(p, k_dim, v_dim, block_rows);
    s.q = p + kernel_floats;
    s.state = s.q + block_rows * size_t(k_dim);
    s.rows = reinterpret_cast<uint8_t*>(s.state + block_rows * (o_stride + 2));
    s.prepared = &prepared_[size_t(thread)];
    return s;
  };
  const auto state_at = [&](float* p) {
    return AttentionState{p, p + block_rows * o_stride, p + block_rows * (o_stride + 1)};
  };
  const auto reset = [&](const AttentionState& state) {
    std::fill(state.o, state.o + block_rows * o_stride, 0.0f);
    std::fill(state.m, state.m + block_rows, -std::numeric_limits<float>::infinity());
    std::fill(state.d, state.d + block_rows, 0.0f);
  };
  const auto gather_queries = [&](int stream, int head, int64_t first, int64_t n, float* q) {
    for (int64_t t = 0; t < n; ++t) {
      for (int g = 0; g < group; ++g) {
        const uint8_t* from =
            reinterpret_cast<const uint8_t*>(args.q) + size_t(stream) * args.q_stream_stride +
            size_t(first + t) * args.q_token_stride + size_t(head * group + g) * args.q_head_stride;
        std::memcpy(q + (size_t(t) * size_t(group) + size_t(g)) * size_t(k_dim), from,
                    size_t(k_dim) * sizeof(float));
      }
    }
  };

  // Queries of a block that some tile is attended for.
  struct Part {
    int64_t first = 0, n = 0;
    QueryBlock block;
    AttentionState state;
  };
  const auto part_of = [&](int head, int64_t first, int64_t n, int64_t begin, const Space& space,
                           const AttentionState& state) {
    const size_t row = size_t(begin * group);
    return Part{first + begin,
                n,
                query_block(head, n * group, space.q + row * size_t(k_dim)),
                {state.o + row * o_stride, state.m + row, state.d + row}};
  };
  // Calls body(tile, part, visible, any) for tiles that queries of the block see: visible[t] is
  // what query t of the part sees, any what they all do.
  const auto each_tile = [&](const View::Tiles& tiles, int64_t begin, int64_t end, int stream,
                             int head, int64_t first, int64_t n, const Space& space,
                             const AttentionState& state, auto&& body) {
    uint64_t visible[kBlockTokens];
    const View::Seers* seers =
        tiles.seers.data() + size_t(stream * n_blocks + first / block_tokens) * tiles.words;
    for (int64_t w = begin; w < end; ++w) {
      if (seers[w].end == 0) continue;
      // Of many sequences in one stream, most see nothing of this tile.
      const int64_t span = seers[w].end - seers[w].begin;
      const bool some = 2 * span <= n;
      const Part part = some ? part_of(head, first, span, seers[w].begin, space, state)
                             : part_of(head, first, n, 0, space, state);
      uint64_t any = 0;
      for (int64_t t = 0; t < part.n; ++t) {
        const int64_t query = stream * args.n_tokens + part.first + t;
        visible[t] = tiles.bits[size_t(query) * tiles.words + size_t(w)];
        any |= visible[t];
      }
      body(w, part, visible, any);
    }
  };

  // The next tile of the same queries finds them prepared.
  const auto prepare = [&](const KeyForm& key, int stream, int head, const Part& part,
                           const Space& space) {
    const Prepared wanted{key, stream, head, part.first, part.n};
    if (*space.prepared == wanted) return;
    ops_->prepare_queries(*key.layout, key.weights, part.block, space.scratch);
    *space.prepared = wanted;
  };

  // A tile whose rows were packed with one set of weights.
  const auto attend_under = [&](const KeyForm& key, const ValueLayout& value, int stream, int head,
                                const Part& part, const uint64_t* visible,
                                const uint16_t* const* mask, const Space& space, PackedTile* tile) {
    tile->table = key.weights;
    prepare(key, stream, head, part, space);
    ops_->attend_packed(*key.layout, value, part.block, *tile, visible, mask, space.scratch,
                        part.state);
  };

  // A share of the window of a head comes from memory with each of its packed tiles: rows of a
  // layer lie in runs too short for hardware that looks ahead. Not into the first cache, where
  // lines on their way would keep a tile from its own.
  const auto prefetch_window = [&](int stream, int head, int64_t w) __attribute__((always_inline)) {
    const std::vector<Column>& columns = view_.columns[size_t(stream)];
    const size_t share = (columns.size() + size_t(n_tiles) - 1) / size_t(n_tiles);
    const size_t end = std::min(columns.size(), size_t(w + 1) * share);
    for (size_t i = size_t(w) * share; i < end; ++i) {
      if (columns[i].stage > 0 || columns[i].slot < 0) continue;
      for (const bool keys : {true, false}) {
        const size_t dim = size_t(keys ? k_dim : v_dim);
        const uint8_t* row = StageRows(layer, 0, columns[i].slot, keys).of(head);
        for (size_t at = 0; at < dim * 2; at += 64) __builtin_prefetch(row + at, 0, 2);
      }
    }
  };
  // The tile that is computed next: of this head, of the next one from `begin` on, of the first one
  // from `end` on or of the next stream. Kernels prefetch it.
  const auto name_next = [&](int stream, int head, int64_t w, int64_t begin, int64_t end,
                             PackedTile* tile) {
    if (++w == end) {
      if (++head < layer.n_kv_heads) {
        w = begin;
      } else {
        head = 0;
        if (w == n_tiles) w = 0, ++stream;
      }
    }
    tile->next_bytes = stream < args.n_streams ? layer.head_group_bytes() : 0;
    if (tile->next_bytes == 0) return;
    const int64_t cell = (args.first_stream + stream) * layout_.cells_per_stream + w * kTile;
    const uint8_t* rows = packed_.data() + layout_.key_at(layer, head, cell);
    for (int64_t g = 0; g < kTile / kGroupCells; ++g) {
      const bool there = w * kTile + g * kGroupCells < layout_.cells_per_stream;
      tile->next[g] = there ? rows + size_t(g) * layout_.group_bytes : rows;
    }
  };

  const auto attend_packed = [&](int stream, int head, int64_t first, int64_t n, int64_t tile_begin,
                                 int64_t tile_end, const Space& space,
                                 const AttentionState& state) {
    const int64_t stream_cell = (args.first_stream + stream) * layout_.cells_per_stream;
    const uint16_t* mask[kBlockTokens];
    uint16_t padded[kBlockTokens][kTile];
    PackedTile tile;
    each_tile(
        view_.packed, tile_begin, tile_end, stream, head, first, n, space, state,
        [&](int64_t w, const Part& part, const uint64_t* visible, uint64_t any) {
          if (few) prefetch_window(stream, head, w);
          tile.next_bytes = 0;
          if (n <= kFewTokens || part.n < n)
            name_next(stream, head, w, tile_begin, tile_end, &tile);
          static_assert(kGroupCells == 16);
          const uint8_t* rows =
              packed_.data() + layout_.key_at(layer, head, stream_cell + w * kTile);
          for (int64_t g = 0; g < kTile / kGroupCells; ++g, rows += layout_.group_bytes) {
            if ((any >> (g * kGroupCells) & 0xffff) == 0) continue;
            tile.key[g] = rows;
            tile.value[g] = rows + size_t(kGroupCells) * layer.key.bytes;
          }
          for (int64_t t = 0; part.block.slope != nullptr && t < part.n; ++t) {
            // The mask row may end inside the tile.
            const int64_t here = std::min<int64_t>(kTile, args.n_kv - w * kTile);
            std::memcpy(padded[t], mask_row(stream, part.first + t) + w * kTile, size_t(here) * 2);
            mask[t] = padded[t];
          }
          tile.rows = any;
          const uint16_t id = view_.tile_table[size_t(stream) * view_.packed.words + size_t(w)];
          attend_under(FormOf(layer, layout_.n_stages(), id, head), layer.value, stream, head, part,
                       visible, mask, space, &tile);
        });
  };

  // Rows that do not lie in runs are copied into some: copy(keys, values) puts those of a tile
  // where they are given, cell(i) is the one of row i. table: their weights, -1 where they differ.
  const auto attend_copied = [&](int stage, const KeyLayout& key, const ValueLayout& value,
                                 int stream, int head, const Part& part, const uint64_t* all,
                                 uint64_t any, int32_t table, const Space& space, auto&& cell,
                                 auto&& copy) {
    PackedTile packed;
    for (size_t run = 0; run < kTile / 16; ++run) {
      packed.key[run] = space.rows + run * 16 * key.bytes;
      packed.value[run] = space.rows + kTile * key.bytes + run * 16 * value.bytes;
    }
    const int64_t stream_cell = (args.first_stream + stream) * layout_.cells_per_stream;
    const uint16_t* mask[kBlockTokens];
    uint16_t gathered[kBlockTokens][kTile];
    for (int64_t t = 0; t < part.n; ++t) mask[t] = gathered[t];
    copy(space.rows, space.rows + kTile * key.bytes);
    ForEachBit(&any, 1, [&](int64_t i) {
      for (int64_t t = 0; part.block.slope != nullptr && t < part.n; ++t)
        gathered[t][i] = mask_row(stream, part.first + t)[cell(i) - stream_cell];
    });
    uint64_t visible[kBlockTokens];
    const auto attend_rows = [&](uint16_t id, uint64_t rows) {
      packed.rows = rows;
      for (int64_t t = 0; t < part.n; ++t) visible[t] = all[t] & rows;
      attend_under(FormOf(layer, stage, id, head), value, stream, head, part, visible, mask, space,
                   &packed);
    };
    if (table >= 0 || !key.needs_table()) return attend_rows(uint16_t(std::max(table, 0)), any);
    EachTable(
        any, [&](int64_t i) { return cells_.table(cell(i)); }, attend_rows);
  };

  const auto attend_apart = [&](int stream, int head, int64_t first, int64_t n, int64_t tile_begin,
                                int64_t tile_end, const Space& space, const AttentionState& state) {
    const std::vector<int64_t>& cells = view_.apart_cells[size_t(stream)];
    each_tile(view_.apart, tile_begin, tile_end, stream, head, first, n, space, state,
              [&](int64_t w, const Part& part, const uint64_t* visible, uint64_t any) {
                const auto cell = [&](int64_t i) { return cells[size_t(w * kTile + i)]; };
                attend_copied(layout_.n_stages(), layer.key, layer.value, stream, head, part,
                              visible, any, -1, space, cell, [&](uint8_t* keys, uint8_t* values) {
                                ForEachBit(&any, 1, [&](int64_t i) {
                                  std::memcpy(keys + size_t(i) * layer.key.bytes,
                                              packed_.data() + layout_.key_at(layer, head, cell(i)),
                                              layer.key.bytes);
                                  std::memcpy(
                                      values + size_t(i) * layer.value.bytes,
                                      packed_.data() + layout_.value_at(layer, head, cell(i)),
                                      layer.value.bytes);
                                });
                              });
              });
  };

  // The rows that the head keeps of evicted cells, in tiles of their own.
  const auto attend_kept = [&](int stream, int head, int64_t first, int64_t n, const Space& space,
                               const AttentionState& state) {
    if (view_.evicted_bits.empty()) return;
    const KeptRows& kept = Kept(args.first_stream + stream, layer, head);
    const Part part = part_of(head, first, n, 0, space, state);
    const int64_t stream_cell = (args.first_stream + stream) * layout_.cells_per_stream;
    uint64_t visible[kBlockTokens], all[kBlockTokens];
    const uint16_t* mask[kBlockTokens];
    uint16_t gathered[kBlockTokens][kTile];
    int64_t cells[kTile];
    for (int64_t t = 0; t < n; ++t) mask[t] = gathered[t];
    int64_t at = 0;
    const auto attend_tile = [&](int64_t n_rows) {
      PackedTile tile;
      uint64_t any = 0;
      for (int64_t t = 0; t < n; ++t) {
        all[t] = 0;
        const uint64_t* sees =
            &view_.evicted_bits[size_t(stream * args.n_tokens + first + t) * view_.packed.words];
        for (int64_t i = 0; i < n_rows; ++i) {
          all[t] |= uint64_t{HasBit(sees, cells[i])} << i;
          if (part.block.slope != nullptr) gathered[t][i] = mask_row(stream, first + t)[cells[i]];
        }
        any |= all[t];
      }
      for (int64_t i = 0; i < n_rows; i += kGroupCells) {
        tile.key[i / kGroupCells] = kept.key(layer, at + i);
        tile.value[i / kGroupCells] = kept.value(layer, at + i);
      }
      at += n_rows;
      EachTable(
          any, [&](int64_t i) { return cells_.table(stream_cell + cells[i]); },
          [&](uint16_t id, uint64_t rows) {
            tile.rows = rows;
            for (int64_t t = 0; t < n; ++t) visible[t] = all[t] & rows;
            attend_under(FormOf(layer, layout_.n_stages(), id, head), layer.value, stream, head,
                         part, visible, mask, space, &tile);
          });
    };
    int64_t n_rows = 0;
    const size_t words = std::min(kept.cells.size(), view_.packed.words);
    ForEachBit(kept.cells.data(), words, [&](int64_t i) {
      cells[n_rows++] = i;
      if (n_rows == kTile) attend_tile(std::exchange(n_rows, 0));
    });
    if (n_rows > 0) attend_tile(n_rows);
  };

  const auto attend_window = [&](int stream, int head, int64_t first, int64_t n, const Space& space,
                                 const AttentionState& state) {
    const int64_t stream_cell = (args.first_stream + stream) * layout_.cells_per_stream;
    const uint16_t* mask[kBlockTokens];
    uint16_t gathered[kBlockTokens][kTile];
    DenseTile dense;
    const View::Tiles& tiles = view_.stages[0];
    each_tile(tiles, 0, int64_t(tiles.words), stream, head, first, n, space, state,
              [&](int64_t w, const Part& part, const uint64_t* visible, uint64_t any) {
                const Column* tile = view_.columns[size_t(stream)].data() + w * kTile;
                dense.rows = any;
                for (int64_t t = 0; t < part.n; ++t) mask[t] = gathered[t];
                ForEachBit(&any, 1, [&](int64_t i) {
                  dense.key[i] = WindowNumbers(layer, tile[i], true) + size_t(head) * size_t(k_dim);
                  dense.value[i] =
                      WindowNumbers(layer, tile[i], false) + size_t(head) * size_t(v_dim);
                  for (int64_t t = 0; part.block.slope != nullptr && t < part.n; ++t)
                    gathered[t][i] = mask_row(stream, part.first + t)[tile[i].cell - stream_cell];
                });
                prepare(FormOf(layer, 0, 0, head), stream, head, part, space);
                ops_->attend_dense(part.block, dense, visible, mask, space.scratch, part.state);
              });
  };

  // Rows of a later stage lie in slots.
  const auto attend_recent = [&](int stage, int stream, int head, int64_t first, int64_t n,
                                 const Space& space, const AttentionState& state) {
    const StageLayout& layout = layer.stages[size_t(stage)];
    const View::Tiles& tiles = view_.stages[size_t(stage)];
    const auto row = [&](const View::Piece& piece, bool keys) {
      return StageRows(layer, stage, piece.slot, keys).of(head);
    };
    each_tile(tiles, 0, int64_t(tiles.words), stream, head, first, n, space, state,
              [&](int64_t w, const Part& part, const uint64_t* visible, uint64_t any) {
                const auto copy = [&](uint8_t* keys, uint8_t* values) {
                  for (const View::Piece& piece : tiles.PiecesOf(stream, w)) {
                    if ((any >> piece.at & ((uint64_t{1} << piece.n) - 1)) == 0) continue;
                    std::memcpy(keys + piece.at * layout.key.bytes, row(piece, true),
                                piece.n * layout.key.bytes);
                    std::memcpy(values + piece.at * layout.value.bytes, row(piece, false),
                                piece.n * layout.value.bytes);
                  }
                  if (w + 1 == int64_t(tiles.words)) return;
                  // Pieces are too short for hardware that looks ahead.
                  for (const View::Piece& piece : tiles.PiecesOf(stream, w + 1)) {
                    for (const bool next_keys : {true, false}) {
                      const uint8_t* next = row(piece, next_keys);
                      const size_t bytes =
                          piece.n * (next_keys ? layout.key.bytes : layout.value.bytes);
                      for (size_t at = 0; at < bytes + 63; at += 64)
                        __builtin_prefetch(next + at, 0, 2);
                    }
                  }
                };
                const Column* tile = view_.columns[size_t(stream)].data() + w * kTile;
                attend_copied(
                    stage, layout.key, layout.value, stream, head, part, visible, any,
                    tiles.table[size_t(stream) * (tiles.words + 1) + size_t(w)], space,
                    [&](int64_t i) { return tile[i].cell; }, copy);
              });
  };

  const auto attend_stages = [&](int stream, int head, int64_t first, int64_t n, const Space& space,
                                 const AttentionState& state) {
    for (int stage = 1; stage < layout_.n_stages(); ++stage)
      attend_recent(stage, stream, head, first, n, space, state);
  };

  // Packed values are summed in the rotated basis: turned back once, then the f16 rows of the
  // window join the same state.
  const auto finish = [&](int stream, int head, int64_t first, int64_t n, const Space& space,
                          const AttentionState& state) {
    if (layer.value.rotated()) {
      for (size_t r = 0; r < size_t(n) * size_t(group); ++r) {
        // A row that saw nothing packed is still zero.
        if (state.d[r] != 0.0f) Rotate(state.o + r * o_stride, v_dim, RotationBlock(v_dim));
      }
    }
    attend_window(stream, head, first, n, space, state);
    for (int64_t t = 0; t < n; ++t) {
      for (int g = 0; g < group; ++g) {
        const size_t r = size_t(t) * size_t(group) + size_t(g);
        const int q_head = head * group + g;
        float d = state.d[r], scale = 1.0f;
        const float nothing = -std::numeric_limits<float>::infinity();
        if (args.sinks != nullptr && args.sinks[q_head] != nothing) {
          const float sink = args.sinks[q_head];
          if (sink > state.m[r]) {
            scale = state.m[r] == nothing ? 0.0f : std::exp(state.m[r] - sink);
            d = d * scale + 1.0f;
          } else {
            d += std::exp(sink - state.m[r]);
          }
        }
        // A query that sees nothing gets zeros.
        const float factor = d == 0.0f ? 0.0f : scale / d;
        float* out = args.out + ((size_t(stream) * size_t(args.n_tokens) + size_t(first + t)) *
                                     size_t(args.n_heads) +
                                 size_t(q_head)) *
                                    size_t(v_dim);
        for (int j = 0; j < v_dim; ++j) out[j] = state.o[r * o_stride + size_t(j)] * factor;
      }
    }
  };

  const auto run = [&](int64_t n_tasks, auto&& body) {
    if (n_threads == 1) {
      for (int64_t i = 0; i < n_tasks; ++i) body(i, 0);
    } else {
      pool_.ParallelFor(n_tasks, body);
    }
  };
  const int64_t n_heads = layer.n_kv_heads;
  if (n_splits == 1) {
    run(args.n_streams * n_heads * n_blocks, [&](int64_t task, int thread) {
      // Later blocks of a causal micro-batch see more: they go first.
      const int64_t block = n_blocks - 1 - task / (args.n_streams * n_heads);
      const int stream = int(task / n_heads % args.n_streams), head = int(task % n_heads);
      const int64_t first = block * block_tokens, n = std::min(block_tokens, args.n_tokens - first);
      const Space space = space_of(thread);
      const AttentionState state = state_at(space.state);
      reset(state);
      gather_queries(stream, head, first, n, space.q);
      attend_packed(stream, head, first, n, 0, n_tiles, space, state);
      attend_apart(stream, head, first, n, 0, n_apart, space, state);
      attend_kept(stream, head, first, n, space, state);
      attend_stages(stream, head, first, n, space, state);
      finish(stream, head, first, n, space, state);
    });
    return;
  }
  const auto partial_at = [&](int64_t stream, int64_t head, int64_t split) {
    return partial_.data() + size_t((stream * n_heads + head) * n_splits + split) * state_floats;
  };
  const auto attend_split = [&](int stream, int head, int64_t split, const Space& space) {
    // In the thread's own space: states of neighbours share lines of the cache.
    const AttentionState state = state_at(space.state);
    reset(state);
    gather_queries(stream, head, 0, args.n_tokens, space.q);
    if (split < n_packed_splits) {
      attend_packed(stream, head, 0, args.n_tokens, split * kSplitTiles,
                    std::min(n_tiles, (split + 1) * kSplitTiles), space, state);
      attend_apart(stream, head, 0, args.n_tokens, split * n_apart / n_packed_splits,
                   (split + 1) * n_apart / n_packed_splits, space, state);
    }
    if (split == 0) attend_kept(stream, head, 0, args.n_tokens, space, state);
    if (split == n_splits - 1) attend_stages(stream, head, 0, args.n_tokens, space, state);
    std::copy_n(space.state, state_floats, partial_at(stream, head, split));
  };
  // Right after a part of the same head: its queries are in the thread's space.
  const auto join = [&](int stream, int head, const Space& space) {
    const AttentionState sum = state_at(partial_at(stream, head, 0));
    for (int64_t split = 1; split < n_splits; ++split) {
      const AttentionState part = state_at(partial_at(stream, head, split));
      for (size_t r = 0; r < block_rows; ++r) {
        if (part.d[r] == 0.0f) continue;
        const float m = std::max(sum.m[r], part.m[r]);
        const float a = sum.d[r] == 0.0f ? 0.0f : std::exp(sum.m[r] - m),
                    b = std::exp(part.m[r] - m);
        for (size_t j = 0; j < o_stride; ++j) {
          sum.o[r * o_stride + j] = sum.o[r * o_stride + j] * a + part.o[r * o_stride + j] * b;
        }
        sum.d[r] = sum.d[r] * a + part.d[r] * b;
        sum.m[r] = m;
      }
    }
    finish(stream, head, 0, args.n_tokens, space, sum);
  };
  // Heads of the same rows follow each other: they lie on the same pages, and addresses of pages
  // are found once. The thread that ends the last part of a head joins them.
  parts_left_.assign(size_t(args.n_streams * n_heads), int32_t(n_splits));
  run(args.n_streams * n_splits * n_heads, [&](int64_t task, int thread) {
    const int stream = int(task / (n_heads * n_splits)), head = int(task % n_heads);
    const Space space = space_of(thread);
    attend_split(stream, head, task / n_heads % n_splits, space);
    const std::atomic_ref<int32_t> left(parts_left_[size_t(stream * n_heads + head)]);
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) join(stream, head, space);
  });
}

}  // namespace sparkv

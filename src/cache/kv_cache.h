// The cache: owns rows, knows the time. Rows arrive (Write), wait dense, are packed when they leave
// the window (Attend seals before it attends) and are read packed from then on. docs/design.md
// tells the life of a row.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "base/thread_pool.h"
#include "cache/cache_layout.h"
#include "cache/calibration.h"
#include "cache/cell_table.h"
#include "cache/dense_store.h"
#include "cache/kept_rows.h"
#include "cache/packed_store.h"
#include "cache/row_errors.h"
#include "cache/weight_tables.h"
#include "config/baseline_name.h"
#include "config/recent.h"
#include "ops/op_table.h"

namespace sparkv {

class KvCache {
 public:
  static Status Create(const sparkv_config& config, const sparkv_shape& shape,
                       std::unique_ptr<KvCache>* cache);

  void Clear();
  void SetThreads(int n_threads);
  void SetTeam(ThreadPool::Team team);
  Status Write(bool keys, int layer, const int64_t* cells, int64_t n_rows, const void* rows,
               sparkv_row_type type, size_t row_stride);
  Status Attend(const sparkv_attend_args& args);
  Status Read(bool keys, int layer, int64_t first, int64_t n, uint16_t* rows);
  Status Restore(bool keys, int layer, int64_t first, int64_t n, const uint16_t* rows);
  Status CopyStream(bool keys, int layer, int from, int to);
  void Release(int64_t first, int64_t n);
  Status RotateKeys(int layer, const int32_t* delta, int64_t n_cells, const sparkv_rope& rope);

  void Memory(sparkv_memory* memory) const;
  void HighWater(sparkv_memory* memory) const;
  const char* isa() const { return ops_->name; }
  int64_t unknown_rows() const { return unknown_rows_; }
  int64_t Saliency(int layer, int kv_head, int64_t max_cells, float* saliency, uint8_t* kept);
  size_t SaveWeights(void* bytes, size_t size) const;
  Status LoadWeights(const void* bytes, size_t size);
  Status StartErrors();
  // NULL: not measured.
  const RowErrors* Errors(int layer) const {
    return errors_.empty() ? nullptr : &errors_[size_t(layer)];
  }
  void StartCalibration();
  Calibration Measured() const;
  Status LoadCalibration(const void* bytes, size_t size);

 private:
  using Words = std::vector<uint64_t>;

  static constexpr std::array<int32_t, 1 + kMaxRecentStages> kNoCoded = {-1, -1, -1, -1};
  // A row that is not packed, or not before this micro-batch.
  struct Column {
    int64_t cell;
    int32_t rank;
    int32_t flight;       // row in the arena, or -1: its numbers are in a slot
    int stage = 0;        // where it was before this micro-batch
    int32_t slot = -1;    // of that stage; not in flight
    unsigned enters = 0;  // bits of later stages that queries of this micro-batch see it in
    std::array<int32_t, 1 + kMaxRecentStages> coded = kNoCoded;  // slots of those
    uint16_t table = 0;  // weights of those, and of its packed row
    int32_t seer = 0;    // the first query of its stream that sees it
    bool sealing = false;
    int64_t block = 0;  // with a baseline: its keys are coded with those of the same number
  };
  // How a head's keys of one kind are written: NULL weights where they need none.
  struct KeyForm {
    const KeyLayout* layout = nullptr;
    const float* weights = nullptr;  // KeyWeights
    bool operator==(const KeyForm&) const = default;
  };
  // Rows of heads that are packed together. Values have no form.
  struct RowBatch {
    std::vector<KeyForm> forms;
    std::vector<const uint16_t*> from;
    std::vector<uint8_t*> to;
    // What one layout takes of it.
    std::vector<const float*> weights;
    std::vector<const uint16_t*> some_from;
    std::vector<uint8_t*> some_to;
    void Add(const KeyForm& form, const uint16_t* row, uint8_t* packed) {
      forms.push_back(form);
      from.push_back(row);
      to.push_back(packed);
    }
    size_t bytes() const {
      return forms.capacity() * sizeof(KeyForm) +
             (from.capacity() + to.capacity() + weights.capacity() + some_from.capacity() +
              some_to.capacity()) *
                 sizeof(void*);
    }
    void Clear() {
      forms.clear();
      from.clear();
      to.clear();
    }
  };
  // What sealing needs of a thread, kept so that a step does not allocate.
  struct SealSpace {
    std::vector<uint16_t> rows, after;
    std::vector<uint8_t> passed;
    RowBatch batch;
  };
  struct NewTable {
    uint16_t id;
    std::vector<std::pair<int32_t, int64_t>>
        queries;  // (rank, cell), by rank: whose queries make the weights
  };
  struct TokenPlan {
    int32_t rank = 0;
    uint16_t table = 0;
    bool alone =
        false;  // no other token of its sequence is in this micro-batch: its prompt has ended
  };
  // Cells of one sequence from which every head chooses what it keeps.
  struct Eviction {
    int stream = 0;
    std::vector<int64_t> cells;                        // packed ones, by rank
    Words bits;                                        // the same, [words_per_stream]
    std::vector<Column> dense;                         // its dense rows
    std::vector<std::pair<int32_t, int64_t>> queries;  // (rank, cell), by rank: who chooses
    std::vector<int64_t> keep;                         // rows, per layer
    std::vector<std::vector<KeptRows>> rows;           // [layer][KV head], chosen so far
  };
  // What one micro-batch does to the cache: decided once, at its first Attend, the same for all
  // layers.
  struct Step {
    bool open = false, planned = false;
    std::vector<TokenPlan> tokens;  // per flight
    std::vector<Column> aging;      // rows that enter stages or are packed in this step
    std::unordered_map<int64_t, size_t> aging_of;  // their places, by cell
    std::vector<NewTable> new_tables;
    std::vector<int64_t> observed;  // flight cells whose queries are kept for a later table
    std::vector<int64_t> newest;    // flight cells whose queries may choose at a later eviction
    std::vector<Eviction> evictions;
  };
  // Queries of a micro-batch that share unpacked tiles, at most; few: a token being decoded, or
  // some drafted ones.
  static constexpr int64_t kBlockTokens = 64, kFewTokens = 8;
  // What the queries of a call see.
  struct View {
    // Queries of a block, [begin, end), that see something of a tile.
    struct Seers {
      uint8_t begin = 0, end = 0;
    };
    // Rows at .. at + n - 1 of a tile, side by side in a group of slots.
    struct Piece {
      int32_t slot;
      uint8_t at, n;
    };
    // Rows in tiles of 64, and who sees which of them.
    struct Tiles {
      size_t words = 0;            // tiles of a stream
      std::vector<uint64_t> bits;  // [n_streams * n_tokens][words]
      std::vector<Seers> seers;    // [n_streams][blocks][words]
      // Of a stage behind the window (FindPieces), tile by tile. [n_streams][words + 1]: the first
      // of each, and the weights of its rows, -1 where they differ.
      std::vector<Piece> pieces;
      std::vector<uint32_t> first_piece;
      std::vector<int32_t> table;
      void FindSeers(int64_t n_streams, int64_t n_tokens, int64_t block_tokens);
      // Adds up how many queries see each tile, and the squares of that.
      void Count(int64_t n_streams, int64_t n_tokens, double* reads, double* squares) const;
      std::span<const Piece> PiecesOf(int stream, int64_t tile) const {
        const uint32_t* first = &first_piece[size_t(stream) * (words + 1) + size_t(tile)];
        return {pieces.data() + first[0], first[1] - first[0]};
      }
      size_t memory() const {
        return bits.capacity() * 8 + seers.capacity() * sizeof(Seers) +
               pieces.capacity() * sizeof(Piece) + first_piece.capacity() * 4 +
               table.capacity() * 4;
      }
    };
    int64_t block_tokens = kBlockTokens;  // queries that read a tile together
    Tiles packed;                         // packed cells as they lie
    std::vector<uint16_t> tile_table;     // [n_streams][packed.words] weights of those seen
    Tiles apart;                          // packed cells of other tiles, collected (CollectApart)
    std::vector<std::vector<int64_t>> apart_cells;  // per stream of the call; -1: no cell
    std::vector<Tiles> stages;                      // columns, per stage; 0: f16 numbers
    std::vector<std::vector<Column>> columns;       // per stream of the call
    std::vector<uint64_t> evicted_bits;             // as packed.bits; empty when there are none
    bool in_arena =
        false;  // columns in flight name rows of the arena, which holds the layer being attended
    bool mask_values = false;  // the mask holds numbers besides 0 and -inf
    const uint16_t* mask = nullptr;
    int64_t n_kv = -1, n_tokens = 0;
    int first_stream = 0, n_streams = 0;
  };
  // Tokens that a sequence has weights after, however few of them differ.
  static constexpr int32_t kMostWaiting = 512;
  // Queries that the scratch of a thread holds in the form that rows of `key` want.
  struct alignas(64) Prepared {
    KeyForm key;
    int stream = 0, head = 0;
    int64_t first = 0, n = 0;
    bool operator==(const Prepared&) const = default;
  };

  KvCache() = default;

  // step.cc
  void BeginStep(const int64_t* cells, int64_t n_rows);
  void FinishStep();
  void FinishEntering(const Column& column, bool complete);
  void Compact(int stage);
  void CopySlot(const LayerLayout& layer, int stage, int32_t from, int32_t to, bool keys) const;
  const Column* AgingOf(int64_t cell) const;
  void FlushLayer();
  Status EnsureSlots();
  bool ViewHolds(const sparkv_attend_args& args) const;
  Status Look(const sparkv_attend_args& args);
  Status PlanTokens(const sparkv_attend_args& args, int stream_index, const Words& seen,
                    std::vector<TokenPlan>* tokens);
  uint16_t FindOrMakeTable(const sparkv_attend_args& args, int stream_index, const uint64_t* seen,
                           int64_t own, int32_t rank);
  bool MakesWeights(int64_t cell, int32_t rank);
  int32_t DistinctUpTo(int64_t cell);
  void CountDistinct(const sparkv_attend_args& args, const uint64_t* seen, int64_t base,
                     int64_t own, int64_t parent);
  void PlanSeals(const sparkv_attend_args& args, int stream_index, const Words& seen,
                 const std::vector<TokenPlan>& tokens);
  void PlanObserved(const sparkv_attend_args& args, int stream_index, const Words& seen,
                    const std::vector<TokenPlan>& tokens);
  Status CommitPlan();
  void MarkBits(const sparkv_attend_args& args, const Words& seen,
                const std::vector<std::vector<TokenPlan>>& tokens);
  void ForgetView();
  void MapColumns(const std::vector<Column>& columns);
  void FindPieces(int stage);
  void OrderBySeer(const sparkv_attend_args& args, int stream_index, const Words& seen);
  void CollectApart(const sparkv_attend_args& args);
  void ResolveRanks(const uint64_t* seen, int64_t base);
  template <typename Sees>
  int64_t NewestBefore(int64_t own, Sees&& sees) const;
  void ReleaseBeyond(int stream, int64_t n_kv);
  int64_t FlightOf(const sparkv_attend_args& args, int stream_index, int64_t token) const;

  // seal.cc
  const uint8_t* FlightQuery(const sparkv_attend_args& args, int64_t cell) const;
  void QueryEnergies(const sparkv_attend_args& args, int64_t cell, sparkv_group how,
                     float* energies) const;
  void FillTable(const LayerLayout& layer, uint16_t id, int head, const float* queries,
                 const float* keys);
  void MakeTables(const sparkv_attend_args& args);
  std::vector<uint16_t> TableKeys(const LayerLayout& layer, const NewTable& table) const;
  void MakeTiers(const LayerLayout& layer, const NewTable& table, const sparkv_attend_args& args,
                 float* energy);
  void SealLayer(int layer);
  void CountQueries(const sparkv_attend_args& args);
  void KeepDense(int layer);
  const uint16_t* WindowNumbers(const LayerLayout& layer, const Column& column, bool keys) const;
  void ReadColumn(const LayerLayout& layer, const Column& column, bool keys, uint16_t* row) const;

  // evict.cc
  void PlanEviction(const sparkv_attend_args& args, int stream_index, const Words& seen,
                    const std::vector<TokenPlan>& tokens);
  void PlanQueries(const sparkv_attend_args& args, int stream_index, const Words& seen,
                   const std::vector<TokenPlan>& tokens);
  void KeepQueries(const sparkv_attend_args& args);
  std::vector<float> EvictionScores(const sparkv_attend_args& args, const Eviction& e, int head,
                                    const std::vector<int64_t>& cells) const;
  void EvictLayer(const sparkv_attend_args& args);
  KeptRows CollectRows(const LayerLayout& layer, int head, const Eviction& e,
                       const std::vector<int64_t>& chosen) const;
  void CommitEviction(Eviction* e);
  void ForgetEvicted(int64_t cell);
  void ForgetKept();
  void CountKept();
  void EvictRestored();
  static bool IsNoRow(const uint16_t* key, int dim);
  static void WriteNoRow(uint16_t* key, int dim);
  static int EvictedHeads(const LayerLayout& layer, const uint16_t* row);
  // The packed row of a cell that is sealed or evicted; NULL when this head has evicted it.
  uint8_t* PackedRow(const LayerLayout& layer, int head, int64_t cell, bool keys) const;

  // calibrate.cc
  void CountEnergies(const sparkv_attend_args& args);
  Status TellModel();

  // seal_baseline.cc
  void MakeChannels(const LayerLayout& layer, const NewTable& table, const float* u);
  void SealBaseline(const LayerLayout& layer);
  void CountBaseline(sparkv_memory* m) const;

  // attend.cc
  void AttendLayer(const sparkv_attend_args& args);

  // kv_cache.cc
  void ReleaseCell(int64_t cell);
  size_t WordOf(int64_t cell) const {
    return size_t(layout_.stream_of(cell) * layout_.words_per_stream() +
                  layout_.index_of(cell) / 64);
  }
  uint64_t& SealedWord(int64_t cell) { return sealed_bits_[WordOf(cell)]; }
  uint64_t& EvictedWord(int64_t cell) { return evicted_bits_[WordOf(cell)]; }
  const KeptRows& Kept(int stream, const LayerLayout& layer, int head) const {
    return kept_[size_t(stream) * layout_.heads + layer.head_at + size_t(head)];
  }
  KeptRows& Kept(int stream, const LayerLayout& layer, int head) {
    return kept_[size_t(stream) * layout_.heads + layer.head_at + size_t(head)];
  }
  void AddPacked(int64_t cell);
  void RemovePacked(int64_t cell);
  Status AddDense(int64_t cell, int stage = 0);
  void JoinDense(int64_t cell);
  void RemoveDense(int64_t cell);
  Status TakeSlot(int64_t cell, int stage = 0);
  // A key or value row of each head of a token.
  struct HeadRows {
    uint8_t* first;
    size_t stride;  // bytes from head to head
    uint8_t* of(int head) const { return first + size_t(head) * stride; }
  };
  // Those in a slot. In the window they lie side by side, as in the arena. Behind it the rows of a
  // head in the slots of a group do, keys and then values, for those who read one head.
  HeadRows StageRows(const LayerLayout& layer, int stage, int32_t slot, bool keys) const {
    const StageLayout& rows = layer.stages[size_t(stage)];
    const size_t bytes = keys ? rows.key.bytes : rows.value.bytes;
    const DenseStore& store = stores_[size_t(stage)];
    uint8_t* group = store.rows(slot, rows.at);
    const size_t n_slots = size_t(store.group_slots()), place = size_t(slot) % n_slots;
    if (stage == 0) {
      return {group + place * rows.bytes(layer.n_kv_heads) +
                  (keys ? 0 : size_t(layer.n_kv_heads) * rows.key.bytes),
              bytes};
    }
    return {group + (keys ? 0 : n_slots * rows.key.bytes) + place * bytes, n_slots * rows.bytes(1)};
  }
  // f16 rows of all heads, side by side.
  uint16_t* WindowRow(const LayerLayout& layer, int32_t slot, bool keys) const {
    return reinterpret_cast<uint16_t*>(StageRows(layer, 0, slot, keys).first);
  }
  void Code(const LayerLayout& layer, int stage, uint16_t table_id, bool keys, const uint16_t* row,
            const HeadRows& coded) const;
  void AddCodedRow(const LayerLayout& layer, int stage, uint16_t table_id, bool keys,
                   const uint16_t* row, const HeadRows& coded, RowBatch* batch) const;
  void AddPackedRow(const LayerLayout& layer, int64_t cell, uint16_t table_id, bool keys,
                    const uint16_t* row, RowBatch* batch) const;
  void PackBatch(const ValueLayout& value, bool keys, RowBatch* batch) const;
  void StoreRows(const LayerLayout& layer, bool keys, int64_t n, const int64_t* cells,
                 const uint16_t* rows, RowBatch* batch) const;
  // Calls body(begin, count, space of the thread) for parts of n rows that are packed side by side,
  // on all threads or, in order, on this one.
  template <typename Body>
  void EachChunk(int64_t n, bool in_order, Body&& body) {
    constexpr int64_t kChunk = 16;
    const int64_t n_chunks = (n + kChunk - 1) / kChunk;
    if (seal_space_.size() < size_t(pool_.size())) seal_space_.resize(size_t(pool_.size()));
    const auto chunk = [&](int64_t i, int thread) {
      SealSpace& space = seal_space_[size_t(thread)];
      space.batch.Clear();  // a loop that ran out of memory may have left some
      body(i * kChunk, std::min(kChunk, n - i * kChunk), &space);
    };
    if (!in_order) return pool_.ParallelFor(n_chunks, chunk);
    for (int64_t i = 0; i < n_chunks; ++i) chunk(i, 0);
  }
  void Decode(const LayerLayout& layer, int stage, uint16_t table_id, bool keys,
              const HeadRows& coded, uint16_t* row) const;
  void UnpackKey(const LayerLayout& layer, int head, int64_t cell, uint16_t table_id,
                 uint16_t* key) const;
  void ReadCell(bool keys, const LayerLayout& layer, int64_t cell, uint16_t* out) const;
  void ReadPacked(bool keys, const LayerLayout& layer, int64_t cell, uint16_t table_id,
                  uint16_t* out) const;
  void PackRow(const LayerLayout& layer, int64_t cell, uint16_t table_id, const uint16_t* key,
               const uint16_t* value);
  void ExpandTables(int layer, bool idle_too = false);
  KeyForm FormOf(const LayerLayout& layer, int stage, uint16_t id, int head) const;
  const KeyLayout* LayoutUnder(size_t kind, const KeyLayout& key, const uint16_t* weights);
  void NotePeak();
  void NoteHighWater();

  // restore.cc
  bool PacksToItself(const LayerLayout& layer, int stage, uint16_t table_id, const uint16_t* row);
  uint16_t MatchTable(const LayerLayout& layer, int stage, const uint16_t* row);
  Status EnterStage(const LayerLayout& layer, int64_t cell, const uint16_t* row);
  Status PlaceRestored(int layer, int64_t cell, const uint16_t* row);
  Status DecideRestored(int layer, int64_t cell, const uint16_t* row);
  void SealRestored(int64_t cell);
  void SetTable(int64_t cell, uint16_t table);
  void EndRestore();
  uint64_t Fingerprint() const;

  sparkv_config config_{};
  Baseline baseline_;
  int key_block_ = 1;  // tokens whose keys are coded together, with a baseline
  CacheLayout layout_;
  const OpTable* ops_ = nullptr;
  ThreadPool pool_;
  ThreadPool::Team team_ = nullptr;
  int host_threads_ = 1;

  CellTable cells_;
  std::deque<DenseStore> stores_;  // per stage
  PackedStore packed_;
  WeightTables tables_;
  std::vector<uint64_t> sealed_bits_, evicted_bits_;  // [n_streams][words_per_stream]
  std::vector<KeptRows> kept_;                        // [n_streams][heads]
  std::vector<uint64_t> kept_rows_;                   // per layer
  uint64_t kept_bytes_ = 0, kept_bit_bytes_ = 0;      // of kept_: rows, bits of cells
  std::vector<std::vector<int64_t>> dense_cells_;     // per stream, oldest first, of all stages
  std::vector<int64_t> in_stage_;                     // their number, per stage
  std::vector<int64_t> used_end_;                     // per stream: largest used index + 1
  uint32_t next_order_ = 1;
  // Cells of the step before, by order; they are the newest of all but those in flight while no
  // other cell has been given an order since.
  std::vector<int64_t> latest_cells_;
  uint32_t latest_until_ = 0;
  bool latest_hold_ = false;
  bool unranked_ = false;  // some cell may have no rank
  int64_t n_sealed_ = 0, n_dense_ = 0, n_evicted_ = 0;

  // The micro-batch in flight. Its rows wait in one arena, which the layers use one after the
  // other.
  Step step_;
  View view_;
  Words seen_;                      // [n_streams * n_tokens][words], as the mask has it
  Words column_bits_;               // which cells of a stream are columns (MapColumns)
  std::vector<int32_t> column_of_;  // places of those, by the index of their cell
  std::vector<int64_t> flight_cells_;
  std::unordered_map<int64_t, int32_t> flight_at_;
  std::vector<uint8_t> layer_written_, layer_done_;
  std::vector<uint16_t> flight_keys_, flight_values_;
  int arena_layer_ = -1;

  // Energies of queries that may still be needed for a table: f32 [channels] per cell.
  std::unordered_map<int64_t, std::vector<float>> observed_;

  // Queries that may choose at the next eviction: f16 [n_heads][k_dim] per cell and layer.
  std::unordered_map<int64_t, std::vector<std::vector<uint16_t>>> queries_;

  // Energies are summed up while the model is measured, or not yet known to be the calibrated one.
  Calibration calibration_;
  uint16_t calibrated_ = 0;  // its weights, 0: none
  enum class Model { kMeasured, kUntold, kTold, kOther } model_ = Model::kTold;
  std::vector<EnergySums> sums_;  // per layer
  double likeness_ = 0.0;
  std::vector<RowErrors> errors_;  // per layer; empty: not measured

  std::vector<float>
      table_f32_;  // KeyWeights of one layer, [table][n_kv_heads][kWeightParts][k_dim]
  std::vector<const float*> table_of_;  // [id] -> row in table_f32_, or NULL
  // Layouts of keys under each of them, [id][n_kv_heads][n_stages, packed last].
  std::vector<const KeyLayout*> table_keys_;
  std::deque<KeyLayout> key_layouts_;
  std::unordered_map<uint64_t, const KeyLayout*> layouts_under_;
  std::vector<std::vector<float>> thread_space_;  // attention scratch per thread
  std::vector<Prepared> prepared_;                // of each thread, in one call
  std::vector<SealSpace> seal_space_;             // per thread
  std::vector<float> partial_;                    // attention states of split tasks
  std::vector<int32_t> parts_left_;               // of a stream's head
  bool needs_weights_ = false;                    // some layer packs keys with weights

  struct RestoreSession {
    bool open = false;
    int first_layer = -1;
    int deciding = -1;                    // the layer whose keys tell which cells are packed
    std::set<std::pair<int, bool>> rows;  // layers, and whether keys, that came before it
    uint16_t matched = 0;                 // weights of the last row that was recognised
    bool range_matched = false;           // one was in the range being restored
    std::vector<int64_t> strangers;       // dense rows of ranges without any
    std::unordered_set<int64_t> cells;
    std::unordered_set<int64_t> evicted;  // of them, those of which some head kept nothing
  } restore_;
  struct CopySession {
    int from = -1, to = -1;
    std::unordered_set<int> done;  // layer * 2 + keys
  } copy_;
  int64_t unknown_rows_ = 0;

  uint64_t peak_ = 0;
  sparkv_memory high_water_{};
};

}  // namespace sparkv

// The life of a micro-batch. Which rows are packed, with which weights, and what each query sees is
// a function of the tokens before it in its own sequence, never of how the host cuts prompts into
// micro-batches or what other sequences do (docs/design.md, "one answer"). Sequences are not
// announced: a query's mask row shows which cells are its past.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "base/half.h"
#include "cache/kv_cache.h"
#include "cache/visible.h"

namespace sparkv {
namespace {

// Dense slots of cells in flight that have none: not decided yet, or packed in this step.
constexpr int32_t kNoSlot = -1, kPackedSlot = -2;

}  // namespace

Status KvCache::Write(bool keys, int layer_index, const int64_t* cells, int64_t n_rows,
                      const void* rows, sparkv_row_type type, size_t row_stride) {
  EndRestore();
  copy_ = {};
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  if (keys) {
    const bool same = step_.open && int64_t(flight_cells_.size()) == n_rows &&
                      std::equal(cells, cells + n_rows, flight_cells_.begin());
    if (!same || layer_written_[size_t(layer_index)] != 0) {
      FinishStep();
      BeginStep(cells, n_rows);
    }
    if (arena_layer_ != layer_index) FlushLayer();
    arena_layer_ = layer_index;
    flight_values_.assign(size_t(n_rows) * layer.v_row(), 0);
    layer_written_[size_t(layer_index)] = 1;
  } else {
    if (arena_layer_ != layer_index || int64_t(flight_cells_.size()) != n_rows ||
        !std::equal(cells, cells + n_rows, flight_cells_.begin())) {
      return Status::Invalid("values: layer " + std::to_string(layer_index) +
                             " was not given keys for the same cells");
    }
  }
  std::vector<uint16_t>& arena = keys ? flight_keys_ : flight_values_;
  const size_t n = keys ? layer.k_row() : layer.v_row();
  arena.resize(size_t(n_rows) * n);
  for (int64_t i = 0; i < n_rows; ++i) {
    const uint8_t* from = static_cast<const uint8_t*>(rows) + size_t(i) * row_stride;
    uint16_t* to = arena.data() + size_t(i) * n;
    if (type == SPARKV_ROW_F16) {
      std::memcpy(to, from, n * 2);
    } else {
      const float* f = reinterpret_cast<const float*>(from);
      for (size_t j = 0; j < n; ++j) to[j] = FloatToHalf(f[j]);
    }
  }
  return Status::Ok();
}

void KvCache::BeginStep(const int64_t* cells, int64_t n_rows) {
  latest_hold_ = latest_until_ == next_order_;
  flight_cells_.assign(cells, cells + n_rows);
  flight_at_.clear();
  for (int64_t i = 0; i < n_rows; ++i) {
    const int64_t cell = cells[i];
    if (cell < 0) continue;
    cells_.Touch(cell);
    ReleaseCell(cell);
    flight_at_[cell] = int32_t(i);
    cells_.set_state(cell, CellState::kFlight);
    cells_.order(cell) = next_order_++;
    cells_.rank(cell) = -1;
    cells_.distinct(cell) = 0;
    cells_.slot(cell) = kNoSlot;
    int64_t& end = used_end_[size_t(layout_.stream_of(cell))];
    end = std::max(end, layout_.index_of(cell) + 1);
  }
  step_ = Step{};
  step_.open = true;
  std::fill(layer_written_.begin(), layer_written_.end(), 0);
  std::fill(layer_done_.begin(), layer_done_.end(), 0);
  arena_layer_ = -1;
}

// Gives a dense slot to every cell in flight that will not be packed in this step.
Status KvCache::EnsureSlots() {
  for (const int64_t cell : flight_cells_) {
    if (cell < 0 || cells_.state(cell) != CellState::kFlight || cells_.slot(cell) != kNoSlot)
      continue;
    if (Status s = TakeSlot(cell); !s.ok()) return s;
  }
  return Status::Ok();
}

// Another layer takes the arena: what is in it and was not attended stays dense.
void KvCache::FlushLayer() {
  if (arena_layer_ < 0 || layer_done_[size_t(arena_layer_)] != 0) return;
  if (step_.planned) {
    ExpandTables(arena_layer_);
    SealLayer(arena_layer_);
  } else if (!EnsureSlots().ok()) {
    return;
  }
  KeepDense(arena_layer_);
  layer_done_[size_t(arena_layer_)] = 1;
}

// Makes the outcome of the step the state of the cells.
void KvCache::FinishStep() {
  if (!step_.open) return;
  FlushLayer();
  step_.open = false;
  // A step that stopped between layers packed its rows in some of them only: rows that waited dense
  // stay dense.
  const bool complete =
      std::all_of(layer_done_.begin(), layer_done_.end(), [](uint8_t done) { return done != 0; });
  for (const Column& column : step_.aging) {
    if (column.enters != 0) FinishEntering(column, complete);
    if (!column.sealing) continue;
    if (column.flight < 0 && !complete) {
      RemovePacked(column.cell);
      // Rows of a stage need the weights they have.
      if (column.stage == 0) {
        tables_.Unref(cells_.table(column.cell));
        cells_.table(column.cell) = 0;
      }
      continue;
    }
    if (column.flight < 0) RemoveDense(column.cell);
    observed_.erase(column.cell);
    cells_.set_state(column.cell, CellState::kSealed);
    ++n_sealed_;
  }
  for (const NewTable& table : step_.new_tables) {
    for (const auto& [rank, cell] : table.queries) observed_.erase(cell);
  }
  for (Eviction& eviction : step_.evictions) {
    if (complete) CommitEviction(&eviction);
  }
  step_.evictions.clear();
  for (const int64_t cell : flight_cells_) {
    if (cell < 0 || cells_.state(cell) != CellState::kFlight) continue;
    if (cells_.slot(cell) < 0) {
      // No memory for its row: the cell is lost, and the call that could not place it has said so.
      tables_.Unref(cells_.table(cell));
      cells_.table(cell) = 0;
      cells_.set_state(cell, CellState::kEmpty);
      continue;
    }
    cells_.set_state(cell, CellState::kDense);
    JoinDense(cell);
  }
  for (const int64_t cell : flight_cells_) unranked_ |= cell >= 0 && cells_.rank(cell) < 0;
  latest_cells_.swap(flight_cells_);
  latest_until_ = next_order_;
  flight_cells_.clear();
  flight_at_.clear();
  arena_layer_ = -1;
  view_.n_kv = -1;
  // Rows of a long micro-batch were coded before older ones had gone.
  const bool few = latest_cells_.size() <= kFewTokens;
  if (!few) {
    NotePeak();
    for (int stage = 0; stage < layout_.n_stages(); ++stage) Compact(stage);
  }
  for (DenseStore& store : stores_) store.Trim(/*keep_next=*/few);
  NotePeak();
  NoteHighWater();
}

// Where a group of slots or more could be given back, rows from behind move into holes.
void KvCache::Compact(int stage) {
  DenseStore& store = stores_[size_t(stage)];
  if (!store.sparse()) return;
  std::vector<std::pair<int32_t, int64_t>> cells;
  for (const std::vector<int64_t>& of_stream : dense_cells_) {
    for (const int64_t cell : of_stream) {
      if (cells_.stage(cell) == stage && cells_.slot(cell) >= store.used())
        cells.emplace_back(cells_.slot(cell), cell);
    }
  }
  // In their order, so that neighbours stay neighbours.
  std::sort(cells.begin(), cells.end());
  for (const auto& [slot, cell] : cells) {
    if (store.lowest_free() >= slot) return;
    const int32_t to = store.Allocate();
    for (const LayerLayout& layer : layout_.layers) {
      for (const bool keys : {true, false}) CopySlot(layer, stage, slot, to, keys);
    }
    store.Free(slot);
    cells_.slot(cell) = to;
  }
}

void KvCache::CopySlot(const LayerLayout& layer, int stage, int32_t from, int32_t to,
                       bool keys) const {
  const StageLayout& rows = layer.stages[size_t(stage)];
  const HeadRows source = StageRows(layer, stage, from, keys),
                 target = StageRows(layer, stage, to, keys);
  for (int h = 0; h < layer.n_kv_heads; ++h)
    std::memcpy(target.of(h), source.of(h), keys ? rows.key.bytes : rows.value.bytes);
}

// A row that entered stages in this step stays in the oldest of them, unless it was packed, or the
// step stopped before all layers had it.
void KvCache::FinishEntering(const Column& column, bool complete) {
  const bool stays = !column.sealing && (column.flight >= 0 || complete);
  int last = 0;
  for (int stage = 1; stage < layout_.n_stages(); ++stage) {
    if (column.coded[size_t(stage)] < 0) continue;
    if (last > 0) stores_[size_t(last)].Free(column.coded[size_t(last)]);
    last = stage;
  }
  if (last == 0) return;
  if (!stays) {
    stores_[size_t(last)].Free(column.coded[size_t(last)]);
    return;
  }
  cells_.stage(column.cell) = uint8_t(last);
  cells_.slot(column.cell) = column.coded[size_t(last)];
  if (column.flight >= 0) {
    cells_.set_state(column.cell, CellState::kDense);
    return JoinDense(column.cell);
  }
  stores_[size_t(column.stage)].Free(column.slot);
  --in_stage_[size_t(column.stage)];
  ++in_stage_[size_t(last)];
}

// What this step does to the row of a cell; NULL: nothing.
const KvCache::Column* KvCache::AgingOf(int64_t cell) const {
  const auto found = step_.aging_of.find(cell);
  return step_.open && found != step_.aging_of.end() ? &step_.aging[found->second] : nullptr;
}

// Cell that query `token` of the call wrote in this step, or -1.
int64_t KvCache::FlightOf(const sparkv_attend_args& args, int stream_index, int64_t token) const {
  if (!step_.open || int64_t(flight_cells_.size()) != args.n_tokens * args.n_streams) return -1;
  const int64_t cell = flight_cells_[size_t(stream_index * args.n_tokens + token)];
  if (cell < 0 || cells_.state(cell) != CellState::kFlight) return -1;
  return layout_.stream_of(cell) == args.first_stream + stream_index ? cell : -1;
}

// Restored cells learn their place from the first query that sees them: they are older than what it
// was written with.
void KvCache::ResolveRanks(const uint64_t* seen, int64_t base) {
  bool unknown = false;
  ForEachBit(seen, view_.packed.words, [&](int64_t i) {
    unknown |= cells_.rank(base + i) < 0 && cells_.state(base + i) != CellState::kFlight;
  });
  if (!unknown) return;
  std::vector<std::pair<uint32_t, int64_t>> by_age;
  ForEachBit(seen, view_.packed.words, [&](int64_t i) {
    const CellState state = cells_.state(base + i);
    if (state == CellState::kDense || state == CellState::kSealed || state == CellState::kEvicted)
      by_age.emplace_back(cells_.order(base + i), base + i);
  });
  std::sort(by_age.begin(), by_age.end());
  int32_t rank = 0;
  for (const auto& [age, cell] : by_age) {
    if (cells_.rank(cell) < 0) cells_.rank(cell) = rank;
    rank = cells_.rank(cell) + 1;
  }
}

// The weights of a sequence that has none yet: those of an older row of its own (restored), else
// new ones from its first `observe` queries (its last ones with seal = prefill-end). 0 when no
// number is left.
uint16_t KvCache::FindOrMakeTable(const sparkv_attend_args& args, int stream_index,
                                  const uint64_t* seen, int64_t own, int32_t rank) {
  const int64_t base = (args.first_stream + stream_index) * layout_.cells_per_stream;
  uint32_t newest = 0;
  uint16_t found = 0;
  ForEachBit(seen, view_.packed.words, [&](int64_t i) {
    if (cells_.state(base + i) == CellState::kEmpty || cells_.table(base + i) == 0) return;
    if (cells_.order(base + i) > newest) {
      newest = cells_.order(base + i);
      found = cells_.table(base + i);
    }
  });
  if (found != 0) return found;
  if (calibrated_ != 0) return calibrated_;

  NewTable made{tables_.Make(), {}};
  if (made.id == 0) return 0;
  const bool prefill_end = config_.seal == SPARKV_SEAL_PREFILL_END;
  std::vector<std::pair<int32_t, int64_t>> any;
  ForEachBit(seen, view_.packed.words, [&](int64_t i) {
    const int64_t cell = base + i;
    if (flight_at_.count(cell) == 0 && observed_.count(cell) == 0) return;
    const int32_t r = cell == own ? rank : cells_.rank(cell);
    any.emplace_back(r, cell);
    if (prefill_end ? r > rank - config_.observe && r <= rank : MakesWeights(cell, r))
      made.queries.emplace_back(r, cell);
  });
  // A sequence whose first queries are gone (restored, cut), or whose tokens are mostly alike, is
  // judged by the queries at hand, the first ones.
  std::sort(any.begin(), any.end());
  for (size_t i = 0; i < any.size() && made.queries.size() < size_t(config_.observe); ++i) {
    if (!prefill_end && !MakesWeights(any[i].second, any[i].first)) made.queries.push_back(any[i]);
  }
  if (made.queries.empty()) made.queries = any;
  if (made.queries.empty()) made.queries.emplace_back(rank, own);
  std::sort(made.queries.begin(), made.queries.end());
  if (made.queries.size() > size_t(config_.observe)) made.queries.resize(size_t(config_.observe));
  for (const auto& [r, cell] : any) {
    const bool asks = std::find(made.queries.begin(), made.queries.end(), std::pair(r, cell)) !=
                      made.queries.end();
    if (!asks && !prefill_end) observed_.erase(cell);
  }
  step_.new_tables.push_back(std::move(made));
  return step_.new_tables.back().id;
}

// Whether the queries of a token at that rank of its sequence are among those that make its weights
// (not with seal = prefill-end).
bool KvCache::MakesWeights(int64_t cell, int32_t rank) {
  const int32_t distinct = cells_.distinct(cell);
  return distinct == 0 ? rank < config_.observe : distinct > 0 && distinct <= config_.observe;
}

// How many tokens of a sequence up to this one, -1: none, differ; where nobody counted, all do.
int32_t KvCache::DistinctUpTo(int64_t cell) {
  if (cell < 0) return 0;
  const int32_t distinct = cells_.distinct(cell);
  return distinct != 0 ? std::abs(distinct) : cells_.rank(cell) + 1;
}

// Counts a token in flight whose parent, -1: none, has no weights. A text may begin with a page of
// blank lines: weights from one token over and over would fit no other. Tokens are told by their
// values in the model's first layer, where nothing of their context is in them; a cache of later
// layers counts every token.
void KvCache::CountDistinct(const sparkv_attend_args& args, const uint64_t* seen, int64_t base,
                            int64_t own, int64_t parent) {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  const size_t dim = size_t(layer.v_dim());  // one head tells
  const auto values = [&](int64_t cell) -> const uint16_t* {
    if (const auto flight = flight_at_.find(cell); flight != flight_at_.end())
      return flight_values_.data() + size_t(flight->second) * layer.v_row();
    if (cells_.state(cell) != CellState::kDense || cells_.stage(cell) > 0) return nullptr;
    return WindowRow(layer, cells_.slot(cell), false);
  };
  bool repeats = false;
  if (layer.number == 0 && arena_layer_ == args.layer) {
    const uint16_t* mine = values(own);
    float value[kMaxHeadDim];
    for (size_t j = 0; j < dim; ++j) value[j] = HalfToFloat(mine[j]);
    ForEachBit(seen, view_.packed.words, [&](int64_t i) {
      const int64_t cell = base + i;
      if (repeats || cell == own || cells_.distinct(cell) <= 0 || cells_.table(cell) != 0) return;
      const uint16_t* other = values(cell);
      if (other == nullptr) return;
      float off = 0.0f, length = 0.0f;
      for (size_t j = 0; j < dim; ++j) {
        const float x = value[j], y = HalfToFloat(other[j]);
        off += (x - y) * (x - y);
        length += x * x + y * y;
      }
      repeats = length > 0.0f && off <= length * (1.0f / 128);
    });
  }
  const int32_t before = DistinctUpTo(parent);
  cells_.distinct(own) = repeats ? -before : before + 1;
}

// The newest cell before `own` that is seen, if it is of this step or the one before; else -1.
template <typename Sees>
int64_t KvCache::NewestBefore(int64_t own, Sees&& sees) const {
  for (int64_t i = flight_at_.at(own); i-- > 0;) {
    const int64_t cell = flight_cells_[size_t(i)];
    if (cell >= 0 && cell != own && sees(cell)) return cell;
  }
  if (!latest_hold_) return -1;
  for (size_t i = latest_cells_.size(); i-- > 0;) {
    const int64_t cell = latest_cells_[i];
    if (cell < 0 || !sees(cell)) continue;
    const CellState state = cells_.state(cell);
    if (state != CellState::kEmpty && state != CellState::kFlight) return cell;
  }
  return -1;
}

// Rank and weights of each query of one stream.
Status KvCache::PlanTokens(const sparkv_attend_args& args, int stream_index, const Words& seen,
                           std::vector<TokenPlan>* tokens) {
  const int64_t base = (args.first_stream + stream_index) * layout_.cells_per_stream;
  const bool prefill_end = config_.seal == SPARKV_SEAL_PREFILL_END;
  const size_t words = view_.packed.words;
  tokens->assign(size_t(args.n_tokens), {});
  int64_t previous = -1;
  for (int64_t t = 0; t < args.n_tokens; ++t) {
    TokenPlan& plan = (*tokens)[size_t(t)];
    const uint64_t* row = &seen[size_t(stream_index * args.n_tokens + t) * words];
    const auto sees = [&](const uint64_t* bits, int64_t cell) {
      const int64_t i = cell - base;
      return i >= 0 && i < args.n_kv && HasBit(bits, i);
    };
    const int64_t own = FlightOf(args, stream_index, t);
    if (own >= 0 && step_.planned) {
      plan = step_.tokens[size_t(flight_at_[own])];
      continue;
    }
    // The newest other cell it sees is the token before it; within a micro-batch that is mostly the
    // query before it, else mostly a token of the step before.
    int64_t parent = -1;
    if (own >= 0 && previous >= 0 && sees(row, previous)) {
      parent = previous;
    } else if (!unranked_ && own >= 0) {
      parent = NewestBefore(own, [&](int64_t cell) { return sees(row, cell); });
    }
    if (parent < 0) {
      if (unranked_) ResolveRanks(row, base);
      uint32_t newest = 0;
      ForEachBit(row, words, [&](int64_t i) {
        const int64_t cell = base + i;
        const CellState state = cells_.state(cell);
        if (cell == own || state == CellState::kEmpty) return;
        if (state == CellState::kFlight && own >= 0 && cells_.order(cell) > cells_.order(own))
          return;
        if (cells_.order(cell) > newest) {
          newest = cells_.order(cell);
          parent = cell;
        }
      });
    }
    plan.rank = parent >= 0 ? cells_.rank(parent) + 1 : 0;
    plan.table = parent >= 0 ? cells_.table(parent) : 0;
    if (own < 0) continue;
    if (prefill_end || config_.evict != SPARKV_EVICT_NONE) {
      plan.alone = parent >= 0 && flight_at_.count(parent) == 0;
      for (int64_t later = t + 1; later < args.n_tokens && plan.alone; ++later) {
        plan.alone = !sees(&seen[size_t(stream_index * args.n_tokens + later) * words], own);
      }
    }
    if (plan.table == 0 && needs_weights_) {
      bool now = prefill_end ? plan.alone : calibrated_ != 0;
      if (!prefill_end && !now) {
        now = DistinctUpTo(parent) >= config_.observe ||
              plan.rank >= std::max(config_.observe, kMostWaiting);
        if (!now) CountDistinct(args, row, base, own, parent);
      }
      if (now) {
        plan.table = FindOrMakeTable(args, stream_index, row, own, plan.rank);
        if (plan.table == 0) return Status::NoMemory("weights: more than 65534 sequences");
      }
    }
    cells_.rank(own) = plan.rank;
    cells_.table(own) = plan.table;
    if (plan.table != 0) {
      tables_.Ref(plan.table);
      tables_.Used(plan.table);
    }
    step_.tokens[size_t(flight_at_[own])] = plan;
    previous = own;
  }
  return Status::Ok();
}

// A dense row enters a later stage, or is packed, when a query of its sequence that has weights
// finds it old enough.
void KvCache::PlanSeals(const sparkv_attend_args& args, int stream_index, const Words& seen,
                        const std::vector<TokenPlan>& tokens) {
  const int64_t base = (args.first_stream + stream_index) * layout_.cells_per_stream;
  const bool prefill_end = config_.seal == SPARKV_SEAL_PREFILL_END;
  for (Column& column : view_.columns[size_t(stream_index)]) {
    const int64_t i = column.cell - base;
    if (column.rank < config_.sinks || cells_.pinned(column.cell) != 0) continue;
    if (column.flight >= 0 && cells_.slot(column.cell) >= 0)
      continue;  // its first layers are dense already
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      const TokenPlan& plan = tokens[size_t(t)];
      const bool ready = needs_weights_ ? plan.table != 0 : !prefill_end || plan.alone;
      const int stage = layout_.StageOf(plan.rank, column.rank);
      const bool packed = stage == layout_.n_stages();
      if (!ready || (!packed && stage <= column.stage)) continue;
      if (!HasBit(&seen[size_t(stream_index * args.n_tokens + t) * view_.packed.words], i))
        continue;
      // Rows of a stage keep their weights.
      if (column.table == 0 && column.stage > 0) column.table = cells_.table(column.cell);
      if (column.table == 0) column.table = plan.table;
      if (!packed) {
        column.enters |= 1u << stage;
        continue;
      }
      column.sealing = true;
      column.block =
          ((stream_index * args.n_tokens + t) << 32) + (column.rank - config_.sinks) / key_block_;
      break;
    }
    if (column.enters != 0 || column.sealing) step_.aging.push_back(column);
  }
}

// Which queries a later table of the same sequence will ask for.
void KvCache::PlanObserved(const sparkv_attend_args& args, int stream_index, const Words& seen,
                           const std::vector<TokenPlan>& tokens) {
  const int64_t base = (args.first_stream + stream_index) * layout_.cells_per_stream;
  const bool prefill_end = config_.seal == SPARKV_SEAL_PREFILL_END;
  const auto sees = [&](int64_t t, int64_t cell) {
    const int64_t i = cell - base;
    return HasBit(&seen[size_t(stream_index * args.n_tokens + t) * view_.packed.words], i);
  };
  for (int64_t t = 0; t < args.n_tokens; ++t) {
    const int64_t own = FlightOf(args, stream_index, t);
    const TokenPlan& plan = tokens[size_t(t)];
    if (own < 0 || plan.table != 0) continue;
    bool wanted = prefill_end || plan.rank < config_.observe || MakesWeights(own, plan.rank);
    for (int64_t later = t + 1; later < args.n_tokens && wanted; ++later) {
      if (!sees(later, own)) continue;
      wanted = tokens[size_t(later)].table == 0 &&
               !(prefill_end && tokens[size_t(later)].rank - plan.rank >= config_.observe);
    }
    if (wanted) step_.observed.push_back(own);
  }
  if (!prefill_end) return;
  for (const Column& column : view_.columns[size_t(stream_index)]) {
    if (column.flight >= 0 || observed_.count(column.cell) == 0) continue;
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      const TokenPlan& plan = tokens[size_t(t)];
      if (plan.table != 0 || plan.rank - column.rank < config_.observe || !sees(t, column.cell))
        continue;
      observed_.erase(column.cell);
      break;
    }
  }
}

// Takes memory for what was planned.
Status KvCache::CommitPlan() {
  for (size_t i = 0; i < step_.aging.size(); ++i) {
    Column& column = step_.aging[i];
    for (int stage = 1; stage < layout_.n_stages(); ++stage) {
      if ((column.enters >> stage & 1) == 0) continue;
      int32_t& slot = column.coded[size_t(stage)];
      slot = stores_[size_t(stage)].Allocate();
      if (slot < 0) return Status::NoMemory("recent rows: no free slot");
    }
    if (cells_.table(column.cell) != column.table) {
      tables_.Unref(cells_.table(column.cell));
      tables_.Ref(column.table);
      cells_.table(column.cell) = column.table;
    }
    if (column.sealing) AddPacked(column.cell);
    if (column.flight >= 0) cells_.slot(column.cell) = kPackedSlot;
    step_.aging_of[column.cell] = i;
  }
  for (const NewTable& table : step_.new_tables) tables_.Unref(table.id);  // its cells hold it now
  return EnsureSlots();
}

void KvCache::ForgetView() {
  view_ = View{};
  seen_ = column_bits_ = Words();
  column_of_ = {};
}

// Where the columns of a stream are, by the index of their cell.
void KvCache::MapColumns(const std::vector<Column>& columns) {
  column_bits_.assign(view_.packed.words, 0);
  column_of_.resize(view_.packed.words * 64);
  for (size_t c = 0; c < columns.size(); ++c) {
    const int64_t i = layout_.index_of(columns[c].cell);
    column_bits_[size_t(i / 64)] |= uint64_t{1} << (i % 64);
    column_of_[size_t(i)] = int32_t(c);
  }
}

// Columns of a stream, in order of age, become those of one sequence after the other.
void KvCache::OrderBySeer(const sparkv_attend_args& args, int stream_index, const Words& seen) {
  std::vector<Column>& columns = view_.columns[size_t(stream_index)];
  MapColumns(columns);
  if (args.n_tokens == 1) return;
  const size_t words = view_.packed.words;
  Words left = column_bits_;
  ForEachFirst(
      &seen[size_t(stream_index * args.n_tokens) * words], args.n_tokens, words, left.data(),
      [&](int64_t t, int64_t i) { columns[size_t(column_of_[size_t(i)])].seer = int32_t(t); });
  std::stable_sort(columns.begin(), columns.end(),
                   [](const Column& x, const Column& y) { return x.seer < y.seer; });
  MapColumns(columns);
}

void KvCache::View::Tiles::FindSeers(int64_t n_streams, int64_t n_tokens, int64_t block_tokens) {
  const int64_t n_blocks = (n_tokens + block_tokens - 1) / block_tokens;
  seers.assign(size_t(n_streams * n_blocks) * words, {});
  if (words == 0) return;
  for (int64_t row = 0; row < n_streams * n_tokens; ++row) {
    const int64_t stream = row / n_tokens, t = row % n_tokens;
    const uint64_t* see = &bits[size_t(row) * words];
    Seers* block = &seers[size_t(stream * n_blocks + t / block_tokens) * words];
    const uint8_t query = uint8_t(t % block_tokens);
    for (size_t w = 0; w < words; ++w) {
      if (see[w] == 0) continue;
      if (block[w].end == 0) block[w].begin = query;
      block[w].end = query + 1;
    }
  }
}

void KvCache::View::Tiles::Count(int64_t n_streams, int64_t n_tokens, double* reads,
                                 double* squares) const {
  std::vector<int64_t> seers_of(words);
  for (int64_t s = 0; s < n_streams; ++s) {
    std::fill(seers_of.begin(), seers_of.end(), 0);
    for (int64_t row = s * n_tokens; row < (s + 1) * n_tokens; ++row) {
      const uint64_t* see = bits.data() + size_t(row) * words;
      for (size_t w = 0; w < words; ++w) seers_of[w] += see[w] != 0 ? 1 : 0;
    }
    for (const int64_t n : seers_of) {
      *reads += double(n);
      *squares += double(n) * double(n);
    }
  }
}

void KvCache::FindPieces(int stage) {
  View::Tiles& tiles = view_.stages[size_t(stage)];
  const int32_t group_slots = stores_[size_t(stage)].group_slots();
  tiles.pieces.clear();
  tiles.first_piece.clear();
  tiles.table.clear();
  for (const std::vector<Column>& columns : view_.columns) {
    for (size_t w = 0; w <= tiles.words; ++w) {
      tiles.first_piece.push_back(uint32_t(tiles.pieces.size()));
      int32_t& table = tiles.table.emplace_back(-1);
      int32_t next = -1;  // slot that the last piece would go on with
      bool first = true;
      for (size_t c = w * kTile; c < std::min(columns.size(), (w + 1) * kTile); ++c) {
        const Column& column = columns[c];
        const int32_t slot = column.stage == stage ? column.slot : column.coded[size_t(stage)];
        if (slot >= 0 && slot == next && slot % group_slots != 0) {
          ++tiles.pieces.back().n;
        } else if (slot >= 0) {
          tiles.pieces.push_back({slot, uint8_t(c % kTile), 1});
        }
        next = slot < 0 ? -1 : slot + 1;
        if (slot < 0) continue;
        const int32_t own = cells_.table(column.cell);
        table = first || table == own ? own : -1;
        first = false;
      }
    }
  }
}

// Bits of what each query sees packed and what it sees dense.
void KvCache::MarkBits(const sparkv_attend_args& args, const Words& seen,
                       const std::vector<std::vector<TokenPlan>>& tokens) {
  size_t most = 0;
  for (const auto& columns : view_.columns) most = std::max(most, columns.size());
  const size_t words = view_.packed.words, dense_words = (most + 63) / 64;
  const size_t rows = size_t(args.n_streams * args.n_tokens);
  view_.packed.bits.assign(rows * words, 0);
  view_.stages.resize(size_t(layout_.n_stages()));
  for (View::Tiles& stage : view_.stages) {
    stage.words = dense_words;
    stage.bits.assign(rows * dense_words, 0);
  }
  view_.evicted_bits.assign(n_evicted_ > 0 ? rows * words : 0, 0);
  for (int s = 0; s < args.n_streams; ++s) {
    const uint64_t* sealed =
        &sealed_bits_[size_t((args.first_stream + s) * layout_.words_per_stream())];
    const uint64_t* evicted =
        &evicted_bits_[size_t((args.first_stream + s) * layout_.words_per_stream())];
    const std::vector<Column>& columns = view_.columns[size_t(s)];
    OrderBySeer(args, s, seen);
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      const size_t row = size_t(s * args.n_tokens + t);
      const TokenPlan& plan = tokens[size_t(s)][size_t(t)];
      const uint64_t* see = &seen[row * words];
      uint64_t* packed = &view_.packed.bits[row * words];
      for (size_t w = 0; w < words; ++w) packed[w] = see[w] & sealed[w];
      for (size_t w = 0; w < words && n_evicted_ > 0; ++w)
        view_.evicted_bits[row * words + w] = see[w] & evicted[w];
      const auto mark = [&](int64_t i) {
        const size_t c = size_t(column_of_[size_t(i)]);
        const Column& column = columns[c];
        // A row packed in this step is still dense for the queries that have it in their window,
        // and for those that come before their sequence has weights.
        int stage =
            plan.table != 0 || column.table == 0 ? layout_.StageOf(plan.rank, column.rank) : 0;
        if (column.sealing && stage == layout_.n_stages()) return;
        packed[i / 64] &= ~(uint64_t{1} << (i % 64));
        stage = std::min(stage, layout_.n_stages() - 1);
        while (stage > column.stage && column.coded[size_t(stage)] < 0) --stage;
        view_.stages[size_t(std::max(stage, column.stage))].bits[row * dense_words + c / 64] |=
            uint64_t{1} << (c % 64);
      };
      for (size_t w = 0; w < words; ++w) {
        const uint64_t bits = see[w] & column_bits_[w];
        ForEachBit(&bits, 1, [&](int64_t i) { mark(int64_t(w * 64) + i); });
      }
    }
  }
  for (int stage = 1; stage < layout_.n_stages(); ++stage) FindPieces(stage);
  CollectApart(args);
  std::vector<View::Tiles*> all = {&view_.packed, &view_.apart};
  for (View::Tiles& stage : view_.stages) all.push_back(&stage);
  // As many queries together as share a tile, on average over what they read: those of sequences
  // that share none are tasks of their own, whose rows stay near from one head to the next.
  // Few are one block.
  view_.block_tokens = kFewTokens;
  if (args.n_tokens > kFewTokens) {
    double reads = 0.0, squares = 0.0;
    for (const View::Tiles* tiles : all)
      tiles->Count(args.n_streams, args.n_tokens, &reads, &squares);
    view_.block_tokens = 1;
    while (view_.block_tokens < kBlockTokens && 1.5 * double(view_.block_tokens) * reads < squares)
      view_.block_tokens *= 2;
  }
  for (View::Tiles* tiles : all)
    tiles->FindSeers(args.n_streams, args.n_tokens, view_.block_tokens);
}

// Cells of sequences that were decoded side by side lie side by side. Where rows of a tile differ
// in weights, or lie thinly, or queries see on average less than half of what others see of them,
// they are read in tiles of their own, in which the rows of a sequence lie together.
void KvCache::CollectApart(const sparkv_attend_args& args) {
  const size_t words = view_.packed.words;
  struct Row {
    uint16_t table;
    int32_t seer;
    int64_t index;
    auto operator<=>(const Row&) const = default;
  };
  view_.tile_table.assign(size_t(args.n_streams) * words, 0);
  view_.apart_cells.resize(size_t(args.n_streams));
  std::vector<Words> apart(static_cast<size_t>(args.n_streams));  // empty: nothing of the stream
  std::vector<std::vector<int32_t>> place_of(static_cast<size_t>(args.n_streams));
  const auto bits_of = [&](int s, int64_t t) {
    return &view_.packed.bits[size_t(s * args.n_tokens + t) * words];
  };
  size_t most = 0;
  for (int s = 0; s < args.n_streams; ++s) {
    view_.apart_cells[size_t(s)].clear();
    const int64_t base = (args.first_stream + s) * layout_.cells_per_stream;
    for (size_t w = 0; w < words; ++w) {
      uint64_t any = 0, each = ~uint64_t{0};  // what some see, what all see that see something
      int64_t n_seers = 0;
      for (int64_t t = 0; t < args.n_tokens; ++t) {
        const uint64_t see = bits_of(s, t)[w];
        if (see == 0) continue;
        any |= see;
        each &= see;
        ++n_seers;
      }
      if (any == 0) continue;
      const int64_t n = std::popcount(any);
      int64_t n_seen = n_seers * n;
      if (each != any) {
        n_seen = 0;
        for (int64_t t = 0; t < args.n_tokens; ++t) n_seen += std::popcount(bits_of(s, t)[w]);
      }
      bool one_table = true;
      if (needs_weights_) {
        const uint16_t* ids = &cells_.table(base + int64_t(w) * kTile);
        const uint16_t id = ids[std::countr_zero(any)];
        view_.tile_table[size_t(s) * words + w] = id;
        int differ = 0;
        if (any == ~uint64_t{0}) {
          for (int i = 0; i < kTile; ++i) differ |= ids[i] ^ id;
        } else {
          ForEachBit(&any, 1, [&](int64_t i) { differ |= ids[i] ^ id; });
        }
        one_table = differ == 0;
      }
      // Kernels take runs of cells whole: half of them idle costs as much as a copy.
      int n_runs = 0;
      for (int run = 0; run < kTile; run += kGroupCells)
        n_runs += (any >> run & 0xffff) != 0 ? 1 : 0;
      const bool dense = n_runs == 1 || 2 * n >= n_runs * kGroupCells;
      if (one_table && dense && 2 * n_seen >= n_seers * n) continue;
      apart[size_t(s)].resize(words);
      apart[size_t(s)][w] = any;
    }
    if (apart[size_t(s)].empty()) continue;
    std::vector<Row> rows;
    Words left = apart[size_t(s)];
    ForEachFirst(bits_of(s, 0), args.n_tokens, words, left.data(), [&](int64_t t, int64_t i) {
      rows.push_back({cells_.table(base + i), int32_t(t), i});
    });
    std::sort(rows.begin(), rows.end());
    std::vector<int64_t>& cells = view_.apart_cells[size_t(s)];
    std::vector<int32_t>& place = place_of[size_t(s)];
    place.resize(words * kTile);
    for (size_t i = 0; i < rows.size(); ++i) {
      // A tile has one set of weights.
      if (i > 0 && rows[i].table != rows[i - 1].table)
        cells.resize((cells.size() + kTile - 1) / kTile * kTile, -1);
      place[size_t(rows[i].index)] = int32_t(cells.size());
      cells.push_back(base + rows[i].index);
    }
    most = std::max(most, cells.size());
  }
  view_.apart.words = (most + kTile - 1) / kTile;
  view_.apart.bits.assign(size_t(args.n_streams * args.n_tokens) * view_.apart.words, 0);
  for (int s = 0; s < args.n_streams; ++s) {
    if (apart[size_t(s)].empty()) continue;
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      uint64_t* to = &view_.apart.bits[size_t(s * args.n_tokens + t) * view_.apart.words];
      for (size_t w = 0; w < words; ++w) {
        if (apart[size_t(s)][w] == 0) continue;
        uint64_t& see = bits_of(s, t)[w];
        ForEachBit(&see, 1, [&](int64_t i) {
          const int32_t at = place_of[size_t(s)][w * kTile + size_t(i)];
          to[at / kTile] |= uint64_t{1} << (at % kTile);
        });
        see = 0;
      }
    }
  }
}

bool KvCache::ViewHolds(const sparkv_attend_args& args) const {
  return step_.planned && step_.open && view_.in_arena && arena_layer_ == args.layer &&
         layer_done_[size_t(args.layer)] == 0 && view_.mask == args.mask &&
         view_.n_kv == args.n_kv && view_.n_tokens == args.n_tokens &&
         view_.first_stream == args.first_stream && view_.n_streams == args.n_streams;
}

// Reads the mask. The first look of a step also plans it; later ones (another mask, a layer
// attended again, no write before) see what is there and change nothing.
Status KvCache::Look(const sparkv_attend_args& args) {
  const bool plan = step_.open && !step_.planned;
  const size_t words = size_t(args.n_kv + 63) / 64;
  const size_t n_seen = size_t(args.n_streams * args.n_tokens) * words;
  // The bits of a prompt are not kept for the tokens that follow it one by one.
  if (seen_.capacity() > 4 * n_seen + 4096) ForgetView();
  view_.n_kv = -1;
  view_.mask_values = false;
  view_.packed.words = words;
  Words& seen = seen_;
  seen.assign(n_seen, 0);
  for (int s = 0; s < args.n_streams; ++s) {
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      uint64_t* row = &seen[size_t(s * args.n_tokens + t) * view_.packed.words];
      if (args.mask == nullptr) {
        SetBits(row, args.n_kv);
      } else {
        const uint8_t* mask = reinterpret_cast<const uint8_t*>(args.mask) +
                              size_t(s) * args.mask_stream_stride +
                              size_t(t) * args.mask_token_stride;
        view_.mask_values |= VisibleBits(reinterpret_cast<const uint16_t*>(mask), args.n_kv, row);
      }
    }
    if (plan) ReleaseBeyond(args.first_stream + s, args.n_kv);
  }
  if (plan) step_.tokens.assign(flight_cells_.size(), {});

  std::vector<std::vector<TokenPlan>> tokens(static_cast<size_t>(args.n_streams));
  view_.columns.assign(size_t(args.n_streams), {});
  const bool in_arena =
      step_.open && layer_done_[size_t(args.layer)] == 0 && arena_layer_ == args.layer;
  view_.in_arena = plan || in_arena;
  for (int s = 0; s < args.n_streams; ++s) {
    if (Status status = PlanTokens(args, s, seen, &tokens[size_t(s)]); !status.ok()) return status;
    std::vector<Column>& columns = view_.columns[size_t(s)];
    const int64_t stream = args.first_stream + s;
    Words any(view_.packed.words, 0);
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      for (size_t w = 0; w < any.size(); ++w)
        any[w] |= seen[size_t(s * args.n_tokens + t) * any.size() + w];
    }
    // What nobody sees must not be there: it would move the others, and with them the order of
    // sums.
    const auto wanted = [&](int64_t cell) {
      const int64_t i = layout_.index_of(cell);
      return i < args.n_kv && HasBit(any.data(), i);
    };
    for (const int64_t cell : dense_cells_[size_t(stream)]) {
      if (wanted(cell))
        columns.push_back({cell, cells_.rank(cell), -1, cells_.stage(cell), cells_.slot(cell)});
    }
    for (size_t i = 0; step_.open && i < flight_cells_.size(); ++i) {
      const int64_t cell = flight_cells_[i];
      if (cell < 0 || layout_.stream_of(cell) != stream || !wanted(cell)) continue;
      const Column* aging = AgingOf(cell);
      if (plan || in_arena) {
        columns.push_back({cell, cells_.rank(cell), int32_t(i)});
      } else if (aging != nullptr && aging->enters != 0) {
        const int stage = int(std::bit_width(aging->enters)) - 1;
        columns.push_back({cell, cells_.rank(cell), -1, stage, aging->coded[size_t(stage)]});
      } else if (cells_.slot(cell) >= 0) {
        columns.push_back({cell, cells_.rank(cell), -1, 0, cells_.slot(cell)});
      }
    }
    std::stable_sort(columns.begin(), columns.end(),
                     [](const Column& x, const Column& y) { return x.rank < y.rank; });
    if (plan) {
      PlanSeals(args, s, seen, tokens[size_t(s)]);
      if (needs_weights_) PlanObserved(args, s, seen, tokens[size_t(s)]);
      PlanQueries(args, s, seen, tokens[size_t(s)]);
      PlanEviction(args, s, seen, tokens[size_t(s)]);
    }
  }
  if (plan) {
    if (Status status = CommitPlan(); !status.ok()) return status;
    step_.planned = true;
  }
  // What becomes of rows was decided by the first look.
  for (std::vector<Column>& columns : view_.columns) {
    for (Column& column : columns) {
      const Column* aging = AgingOf(column.cell);
      if (aging == nullptr) continue;
      column.sealing = aging->sealing;
      column.table = aging->table;
      column.coded = aging->coded;
    }
  }
  MarkBits(args, seen, tokens);
  view_.mask = args.mask;
  view_.n_kv = args.n_kv;
  view_.n_tokens = args.n_tokens;
  view_.first_stream = args.first_stream;
  view_.n_streams = args.n_streams;
  return Status::Ok();
}

}  // namespace sparkv

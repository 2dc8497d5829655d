#include "cache/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"
#include "baselines/baseline.h"
#include "cache/budget.h"
#include "config/config.h"
#include "config/layers.h"
#include "config/parse.h"

namespace sparkv {

Status KvCache::Create(const sparkv_config& config, const sparkv_shape& shape,
                       std::unique_ptr<KvCache>* cache) {
  if (Status s = CheckConfig(config); !s.ok()) return s;
  if (Status s = CheckShape(shape); !s.ok()) return s;
  std::unique_ptr<KvCache> c(new KvCache());
  c->config_ = config;
  if (Status s = SolveBudget({&shape, 1}, &c->config_); !s.ok()) return s;
  if (Status s = ParseBaseline(TextOf(config.baseline), &c->baseline_); !s.ok()) return s;
  c->key_block_ = KeyBlock(c->baseline_);
  if (NeedsChannels(c->baseline_)) c->config_.group = SPARKV_GROUP_ENERGY;  // ThinK's mean of q^2
  c->ops_ = CpuOps(sparkv_simd(config.simd));
  if (c->ops_ == nullptr) {
    return Status::Unsupported(
        std::string("simd: this CPU has no ") +
        (config.simd == SPARKV_SIMD_AVX512 ? "avx512 (F, BW, VL, DQ, VBMI, VBMI2, VNNI)"
         : config.simd == SPARKV_SIMD_AMX ? "amx (TILE, BF16, allowed by the kernel, beside avx512)"
         : config.simd == SPARKV_SIMD_NEON ? "neon"
                                           : "avx2"));
  }
  const int32_t n_model_layers = ModelLayers({&shape, 1});
  CacheLayout& l = c->layout_;
  l.cells_per_stream = shape.cells_per_stream;
  l.n_streams = shape.n_streams;
  const std::vector<RecentStage> recent =
      RecentStages(c->config_);  // a budget may have dropped some
  l.until.push_back(c->config_.window);
  for (const RecentStage& r : recent) l.until.push_back(r.until);
  // Trellis-coded rows are packed side by side, so several take hardly longer than one; keys of a
  // baseline are coded together once the last of them is old enough.
  for (const RecentStage& r : recent)
    l.together.push_back(TierBits(r.kept, 0) + TrellisBits(r.values) > 0 ? kTogether : 1);
  l.together.push_back(c->key_block_);
  l.until.back() += c->key_block_ - 1;
  l.sinks = c->config_.sinks;
  l.slot_bytes.assign(l.until.size(), 0);
  for (int i = 0; i < shape.n_layers; ++i) {
    const sparkv_layer_shape& s = shape.layers[i];
    sparkv_config rows = c->config_;
    if (Status status = SetLayer(LayerNumber(shape, i), n_model_layers, &rows); !status.ok())
      return status;
    LayerLayout layer;
    layer.n_kv_heads = s.n_kv_heads;
    layer.number = LayerNumber(shape, i);
    layer.key = KeyLayout::Make(s.k_dim, KeptChannels(rows.ratio, s.k_dim),
                                sparkv_number(rows.kept), sparkv_recover(rows.recover));
    layer.value = ValueLayout::Make(s.v_dim, sparkv_number(rows.values));
    layer.has_table = layer.key.needs_table() || NeedsChannels(c->baseline_);
    layer.packed_at = l.group_bytes;
    for (size_t stage = 0; stage < l.until.size(); ++stage) {
      StageLayout in_slot{KeyLayout::Make(s.k_dim, s.k_dim, SPARKV_F16, SPARKV_RECOVER_ZERO),
                          ValueLayout::Make(s.v_dim, SPARKV_F16)};
      if (stage > 0) {
        in_slot.key = StageKey(recent[stage - 1], layer.key);
        in_slot.value = StageValue(recent[stage - 1], layer.value);
      }
      in_slot.at = l.slot_bytes[stage];
      l.slot_bytes[stage] += in_slot.bytes(s.n_kv_heads);
      layer.stages.push_back(in_slot);
    }
    layer.channel_at = l.channels;
    layer.head_at = l.heads;
    layer.table_at = l.table_numbers;
    l.group_bytes += size_t(s.n_kv_heads) * layer.head_group_bytes();
    l.heads += size_t(s.n_kv_heads);
    l.channels += layer.k_row();
    l.table_numbers += layer.has_table ? layer.k_row() : 0;
    c->needs_weights_ |= layer.has_table;
    if (layer.key.tiered() || layer.value.trellis()) l.together.back() = kTogether;
    l.layers.push_back(layer);
  }
  const size_t n_groups = size_t(l.groups_per_stream()) * size_t(l.n_streams);
  size_t bytes = 0;
  const size_t most = *std::max_element(l.slot_bytes.begin(), l.slot_bytes.end());
  if (__builtin_mul_overflow(l.group_bytes, n_groups, &bytes) ||
      __builtin_mul_overflow(most, size_t(l.cells()) + kLongGroupSlots, &bytes)) {
    return Status::NoMemory("cells_per_stream: " + std::to_string(shape.cells_per_stream) +
                            " cells exceed the address space");
  }
  if (Status s = c->cells_.Map(l.cells()); !s.ok()) return s;
  for (size_t stage = 0; stage < l.slot_bytes.size(); ++stage) {
    const int64_t rows = stage == 0 ? 0 : l.until[stage] - l.until[stage - 1];
    if (Status s = c->stores_.emplace_back().Map(l.slot_bytes[stage], l.cells(), rows); !s.ok())
      return s;
  }
  c->in_stage_.assign(l.until.size(), 0);
  if (Status s = c->packed_.Map(l.group_bytes, int64_t(n_groups)); !s.ok()) return s;
  c->tables_.Init(l.table_numbers);
  c->sealed_bits_.assign(size_t(l.words_per_stream() * l.n_streams), 0);
  c->evicted_bits_ = c->sealed_bits_;
  c->kept_.resize(l.heads * size_t(l.n_streams));
  c->kept_rows_.assign(l.layers.size(), 0);
  c->dense_cells_.resize(size_t(l.n_streams));
  c->used_end_.assign(size_t(l.n_streams), 0);
  c->layer_written_.assign(l.layers.size(), 0);
  c->layer_done_.assign(l.layers.size(), 0);
  c->SetThreads(1);
  *cache = std::move(c);
  return Status::Ok();
}

void KvCache::SetThreads(int n_threads) {
  host_threads_ = std::clamp(n_threads, 1, 256);
  if (config_.threads > 0) return pool_.Resize(std::min(config_.threads, 256));
  pool_.Resize(host_threads_, team_);
}

void KvCache::SetTeam(ThreadPool::Team team) {
  team_ = team;
  SetThreads(host_threads_);
}

void KvCache::Clear() {
  NotePeak();
  step_ = Step{};
  ForgetView();
  flight_cells_.clear();
  flight_at_.clear();
  arena_layer_ = -1;
  latest_until_ = 0;
  unranked_ = false;
  observed_.clear();
  queries_.clear();
  restore_ = {};
  copy_ = {};
  cells_.Release();
  for (DenseStore& store : stores_) store.Clear();
  std::fill(in_stage_.begin(), in_stage_.end(), 0);
  packed_.Clear();
  if (model_ == Model::kOther) model_ = Model::kUntold;  // other tokens may tell otherwise
  tables_.Clear(calibrated_);
  std::fill(sealed_bits_.begin(), sealed_bits_.end(), 0);
  for (auto& list : dense_cells_) list.clear();
  std::fill(used_end_.begin(), used_end_.end(), 0);
  std::fill(evicted_bits_.begin(), evicted_bits_.end(), 0);
  ForgetKept();
  n_sealed_ = n_dense_ = n_evicted_ = 0;
}

// Memory and bit of a packed row; the cell's state is the caller's.
void KvCache::AddPacked(int64_t cell) {
  packed_.Add(layout_.group_of(cell));
  SealedWord(cell) |= uint64_t{1} << (layout_.index_of(cell) % 64);
}

void KvCache::RemovePacked(int64_t cell) {
  packed_.Remove(layout_.group_of(cell));
  SealedWord(cell) &= ~(uint64_t{1} << (layout_.index_of(cell) % 64));
}

// Into a slot of `stage`.
Status KvCache::AddDense(int64_t cell, int stage) {
  if (Status s = TakeSlot(cell, stage); !s.ok()) return s;
  JoinDense(cell);
  return Status::Ok();
}

// A cell that has its slot.
void KvCache::JoinDense(int64_t cell) {
  dense_cells_[size_t(layout_.stream_of(cell))].push_back(cell);
  ++n_dense_;
  ++in_stage_[cells_.stage(cell)];
}

void KvCache::RemoveDense(int64_t cell) {
  stores_[cells_.stage(cell)].Free(cells_.slot(cell));
  --in_stage_[cells_.stage(cell)];
  std::vector<int64_t>& list = dense_cells_[size_t(layout_.stream_of(cell))];
  list.erase(std::find(list.begin(), list.end(), cell));
  --n_dense_;
}

Status KvCache::TakeSlot(int64_t cell, int stage) {
  const int32_t slot = stores_[size_t(stage)].Allocate();
  if (slot < 0) return Status::NoMemory("dense window: no free slot");
  cells_.slot(cell) = slot;
  cells_.stage(cell) = uint8_t(stage);
  return Status::Ok();
}

// A cell in flight is not released here: a step owns it until FinishStep.
void KvCache::ReleaseCell(int64_t cell) {
  const CellState state = cells_.state(cell);
  if (state == CellState::kEmpty) return;
  if (state == CellState::kDense) {
    RemoveDense(cell);
  } else if (state == CellState::kSealed) {
    RemovePacked(cell);
    --n_sealed_;
  } else if (state == CellState::kEvicted) {
    ForgetEvicted(cell);
  }
  tables_.Unref(cells_.table(cell));
  observed_.erase(cell);
  queries_.erase(cell);
  cells_.set_state(cell, CellState::kEmpty);
  cells_.table(cell) = 0;
  cells_.pinned(cell) = 0;
}

void KvCache::Release(int64_t first, int64_t n) {
  FinishStep();
  EndRestore();
  copy_ = {};
  const int64_t last = std::min(layout_.cells(), first + n);
  for (int64_t cell = std::max<int64_t>(0, first); cell < last; ++cell) {
    if (layout_.index_of(cell) < used_end_[size_t(layout_.stream_of(cell))]) ReleaseCell(cell);
  }
  for (DenseStore& store : stores_) store.Trim(/*keep_next=*/false);
}

// The host says that no cell at or behind n_kv of this stream is in use.
void KvCache::ReleaseBeyond(int stream, int64_t n_kv) {
  int64_t& end = used_end_[size_t(stream)];
  for (int64_t i = n_kv; i < end; ++i) ReleaseCell(stream * layout_.cells_per_stream + i);
  end = std::min(end, n_kv);
}

void KvCache::ExpandTables(int layer_index, bool idle_too) {
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  if (!layer.key.needs_table()) {
    table_of_.assign(tables_.count(), nullptr);
    return;
  }
  const size_t row = layer.table_row(), head = row / size_t(layer.n_kv_heads);
  const std::vector<uint16_t> known = idle_too ? tables_.Known() : tables_.Live();
  table_f32_.resize(known.size() * row + 16);  // vectors may read 16 floats past the end
  table_of_.assign(tables_.count(), nullptr);
  const int n_kinds = layout_.n_stages() + 1;
  table_keys_.resize(tables_.count() * size_t(layer.n_kv_heads * n_kinds));
  for (size_t i = 0; i < known.size(); ++i) {
    const uint16_t* table = tables_.at(known[i])->a.data() + layer.table_at;
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      const uint16_t* weights = table + size_t(h * layer.k_dim());
      ExpandTable(weights, layer.k_dim(), &table_f32_[i * row + size_t(h) * head]);
      for (int stage = 0; stage < n_kinds; ++stage) {
        const KeyLayout& key = layer.key_of(stage);
        table_keys_[size_t((known[i] * layer.n_kv_heads + h) * n_kinds + stage)] =
            key.tiered() ? LayoutUnder(size_t(layer_index * n_kinds + stage), key, weights) : &key;
      }
    }
    table_of_[known[i]] = &table_f32_[i * row];
  }
}

// key.Under(weights), one copy of each layout, so that heads whose rows lie alike can be told by
// its address. Worked out once for each kind of keys, a layer's in one stage, and falls of their
// tiers.
const KeyLayout* KvCache::LayoutUnder(size_t kind, const KeyLayout& key, const uint16_t* weights) {
  const KeyLayout*& known = layouts_under_[uint64_t{kind} << 32 | TierFalls(weights)];
  if (known != nullptr) return known;
  const KeyLayout layout = key.Under(weights);
  const auto same = std::find(key_layouts_.begin(), key_layouts_.end(), layout);
  return known = same != key_layouts_.end() ? &*same : &key_layouts_.emplace_back(layout);
}

// How a head writes keys of a stage (n_stages: packed ones) under weights, 0: none. Where keys have
// tiers or are pruned, ExpandTables(layer) was called.
KvCache::KeyForm KvCache::FormOf(const LayerLayout& layer, int stage, uint16_t id, int head) const {
  const KeyLayout& key = layer.key_of(stage);
  if (!key.needs_table() || id == 0 || table_of_[id] == nullptr) return {&key, nullptr};
  const int n_kinds = layout_.n_stages() + 1;
  return {table_keys_[size_t((id * layer.n_kv_heads + head) * n_kinds + stage)],
          table_of_[id] + size_t(head * kWeightParts * layer.k_dim())};
}

// key, value: f16 rows of all heads; either may be NULL. Heads that evicted the cell take nothing.
// ExpandTables(layer) was called.
void KvCache::PackRow(const LayerLayout& layer, int64_t cell, uint16_t table_id,
                      const uint16_t* key, const uint16_t* value) {
  for (const bool keys : {true, false}) {
    const uint16_t* row = keys ? key : value;
    if (row == nullptr) continue;
    RowBatch batch;
    AddPackedRow(layer, cell, table_id, keys, row, &batch);
    PackBatch(layer.value, keys, &batch);
  }
}

// row: f16 of all heads; heads that have evicted the cell store nothing.
void KvCache::AddPackedRow(const LayerLayout& layer, int64_t cell, uint16_t table_id, bool keys,
                           const uint16_t* row, RowBatch* batch) const {
  const size_t dim = size_t(keys ? layer.k_dim() : layer.v_dim());
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    uint8_t* to = PackedRow(layer, h, cell, keys);
    if (to == nullptr) continue;
    const KeyForm form = keys ? FormOf(layer, layout_.n_stages(), table_id, h) : KeyForm{};
    batch->Add(form, row + size_t(h) * dim, to);
  }
}

// Writes f16 rows [n][row of all heads] over those that cells have, packed or dense, in the form in
// which each has them. ExpandTables(layer) was called.
void KvCache::StoreRows(const LayerLayout& layer, bool keys, int64_t n, const int64_t* cells,
                        const uint16_t* rows, RowBatch* batch) const {
  const size_t row = keys ? layer.k_row() : layer.v_row();
  const int n_stages = layout_.n_stages();
  for (int form = 0; form <= n_stages; ++form) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t cell = cells[i];
      const bool dense = cells_.state(cell) == CellState::kDense;
      if (form != (dense ? cells_.stage(cell) : n_stages)) continue;
      const uint16_t* from = rows + size_t(i) * row;
      if (dense) {
        AddCodedRow(layer, form, cells_.table(cell), keys, from,
                    StageRows(layer, form, cells_.slot(cell), keys), batch);
      } else {
        AddPackedRow(layer, cell, cells_.table(cell), keys, from, batch);
      }
    }
    PackBatch(form < n_stages ? layer.stages[size_t(form)].value : layer.value, keys, batch);
  }
}

void KvCache::PackBatch(const ValueLayout& value, bool keys, RowBatch* batch) const {
  if (!keys) {
    ops_->pack_values(value, int(batch->from.size()), batch->from.data(), batch->to.data());
    return batch->Clear();
  }
  // Rows side by side must lie alike: those of the first layout, then those of the next.
  std::vector<KeyForm>& forms = batch->forms;
  for (size_t first = 0; first < forms.size(); ++first) {
    const KeyLayout* layout = forms[first].layout;
    if (layout == nullptr) continue;  // packed already
    batch->weights.clear();
    batch->some_from.clear();
    batch->some_to.clear();
    for (size_t i = first; i < forms.size(); ++i) {
      if (forms[i].layout != layout) continue;
      batch->weights.push_back(forms[i].weights);
      batch->some_from.push_back(batch->from[i]);
      batch->some_to.push_back(batch->to[i]);
      forms[i].layout = nullptr;
    }
    ops_->pack_keys(*layout, int(batch->weights.size()), batch->weights.data(),
                    batch->some_from.data(), batch->some_to.data());
  }
  batch->Clear();
}

// row: f16 of all heads; coded: where they go in the form of a stage. Stages behind the window need
// the weights: ExpandTables(layer) was called.
void KvCache::Code(const LayerLayout& layer, int stage, uint16_t table_id, bool keys,
                   const uint16_t* row, const HeadRows& coded) const {
  const StageLayout& rows = layer.stages[size_t(stage)];
  RowBatch batch;
  AddCodedRow(layer, stage, table_id, keys, row, coded, &batch);
  PackBatch(rows.value, keys, &batch);
}

void KvCache::AddCodedRow(const LayerLayout& layer, int stage, uint16_t table_id, bool keys,
                          const uint16_t* row, const HeadRows& coded, RowBatch* batch) const {
  const size_t dim = size_t(keys ? layer.k_dim() : layer.v_dim());
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    batch->Add(keys ? FormOf(layer, stage, table_id, h) : KeyForm{}, row + size_t(h) * dim,
               coded.of(h));
  }
}

void KvCache::Decode(const LayerLayout& layer, int stage, uint16_t table_id, bool keys,
                     const HeadRows& coded, uint16_t* row) const {
  const StageLayout& rows = layer.stages[size_t(stage)];
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    if (keys) {
      const KeyForm form = FormOf(layer, stage, table_id, h);
      ops_->unpack_key(*form.layout, form.weights, coded.of(h),
                       row + size_t(h) * size_t(layer.k_dim()));
    } else {
      ops_->unpack_value(rows.value, coded.of(h), row + size_t(h) * size_t(layer.v_dim()));
    }
  }
}

Status KvCache::Read(bool keys, int layer_index, int64_t first, int64_t n, uint16_t* rows) {
  FinishStep();
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  ExpandTables(layer_index);
  const size_t row = keys ? layer.k_row() : layer.v_row();
  EachChunk(n, false, [&](int64_t begin, int64_t count, SealSpace*) {
    for (int64_t i = begin; i < begin + count; ++i)
      ReadCell(keys, layer, first + i, rows + size_t(i) * row);
  });
  return Status::Ok();
}

// A packed key of a head that has not evicted it. ExpandTables(layer) was called.
void KvCache::UnpackKey(const LayerLayout& layer, int head, int64_t cell, uint16_t table_id,
                        uint16_t* key) const {
  const KeyForm form = FormOf(layer, layout_.n_stages(), table_id, head);
  ops_->unpack_key(*form.layout, form.weights, PackedRow(layer, head, cell, true), key);
}

// One row of all heads as f16. ExpandTables(layer) was called.
void KvCache::ReadCell(bool keys, const LayerLayout& layer, int64_t cell, uint16_t* out) const {
  const size_t row = keys ? layer.k_row() : layer.v_row();
  switch (cells_.state(cell)) {
    case CellState::kDense:
      Decode(layer, cells_.stage(cell), cells_.table(cell), keys,
             StageRows(layer, cells_.stage(cell), cells_.slot(cell), keys), out);
      break;
    case CellState::kSealed:
    case CellState::kEvicted:
      ReadPacked(keys, layer, cell, cells_.table(cell), out);
      break;
    default:
      std::memset(out, 0, row * 2);
  }
}

void KvCache::ReadPacked(bool keys, const LayerLayout& layer, int64_t cell, uint16_t table_id,
                         uint16_t* out) const {
  const bool partly = restore_.evicted.count(cell) != 0;
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    const int dim = keys ? layer.k_dim() : layer.v_dim();
    uint16_t* head = out + size_t(h) * size_t(dim);
    const uint8_t* packed = PackedRow(layer, h, cell, keys);
    if (packed == nullptr) {
      keys ? WriteNoRow(head, dim) : void(std::fill(head, head + dim, uint16_t{0}));
    } else if (keys) {
      UnpackKey(layer, h, cell, table_id, head);
      if (partly && IsNoRow(head, dim)) WriteNoRow(head, dim);
    } else {
      ops_->unpack_value(layer.value, packed, head);
    }
  }
}

int64_t KvCache::Saliency(int layer_index, int kv_head, int64_t max_cells, float* saliency,
                          uint8_t* kept) {
  FinishStep();
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  ExpandTables(layer_index);
  const size_t dim = size_t(layer.k_dim()), at = size_t(kv_head) * dim;
  std::vector<uint16_t> row(layer.k_row());
  int64_t n = 0;
  for (int64_t cell = 0; cell < layout_.cells() && n < max_cells; ++cell) {
    if (cells_.state(cell) == CellState::kEmpty) continue;
    ReadCell(true, layer, cell, row.data());
    const float* table = FormOf(layer, layout_.n_stages(), cells_.table(cell), kv_head).weights;
    float* out = saliency + size_t(n) * dim;
    float largest = 0.0f;
    for (size_t j = 0; j < dim; ++j) {
      const float k = HalfToFloat(row[at + j]);
      out[j] = std::abs(k) * (table != nullptr ? KeyWeights(table, layer.k_dim()).weight[j] : 1.0f);
      largest = std::max(largest, out[j]);
    }
    for (size_t j = 0; j < dim && largest > 0.0f; ++j) out[j] /= largest;
    const bool dense = cells_.state(cell) == CellState::kDense;
    const uint8_t* packed = dense ? nullptr : PackedRow(layer, kv_head, cell, true);
    for (size_t j = 0; j < dim; ++j) {
      bool bit = dense || (packed != nullptr && layer.key.kept > 0);
      if (packed != nullptr && layer.key.mask_bytes != 0)
        bit = (packed[layer.key.mask_at + j / 8] >> (j % 8) & 1) != 0;
      kept[size_t(n) * dim + j] = bit ? 1 : 0;
    }
    ++n;
  }
  return n;
}

void KvCache::Memory(sparkv_memory* m) const {
  const uint32_t struct_size = m->struct_size;
  *m = {};
  m->struct_size = struct_size;
  const uint64_t sealed = uint64_t(n_sealed_);
  m->tokens = n_sealed_ + n_dense_ + n_evicted_;
  m->sealed = n_sealed_;
  m->evicted = n_evicted_;
  uint64_t k_row = 0, v_row = 0;
  for (size_t l = 0; l < layout_.layers.size(); ++l) {
    const LayerLayout& layer = layout_.layers[l];
    const uint64_t rows = sealed * uint64_t(layer.n_kv_heads) + kept_rows_[l];
    m->key_masks += rows * layer.key.mask_bytes;
    m->key_signs += rows * layer.key.sign_bytes;
    m->key_scales += rows * layer.key.scale_bytes;
    m->key_kept += rows * (layer.key.low_bytes + layer.key.high_bytes);
    m->value_scales += rows * layer.value.scale_bytes;
    m->value_codes += rows * layer.value.code_bytes;
    k_row += layer.k_row();
    v_row += layer.v_row();
    for (size_t stage = 0; stage < in_stage_.size(); ++stage) {
      const uint64_t in_stage = uint64_t(in_stage_[stage]) * uint64_t(layer.n_kv_heads);
      m->dense_keys += in_stage * layer.stages[stage].key.bytes;
      m->dense_values += in_stage * layer.stages[stage].value.bytes;
    }
  }
  m->tables = tables_.bytes();
  m->cells = cells_.committed() + (sealed_bits_.capacity() + evicted_bits_.capacity()) * 8 +
             packed_.bookkeeping() + kept_bit_bytes_ + kept_.capacity() * sizeof(KeptRows);
  uint64_t slots = 0;
  for (const DenseStore& store : stores_) {
    m->cells += store.bookkeeping();
    slots += store.committed();
  }
  const uint64_t key_rows = m->key_masks + m->key_signs + m->key_scales + m->key_kept;
  const uint64_t value_rows = m->value_scales + m->value_codes;
  const uint64_t packed = packed_.committed() + kept_bytes_;
  m->slack = packed - (key_rows + value_rows) + slots - (m->dense_keys + m->dense_values);
  m->workspace = table_keys_.capacity() * sizeof(void*) + key_layouts_.size() * sizeof(KeyLayout) +
                 layouts_under_.size() * 4 * sizeof(void*);
  m->workspace += (flight_keys_.capacity() + flight_values_.capacity()) * 2 +
                  observed_.size() * layout_.channels * 4 +
                  (seen_.capacity() + column_bits_.capacity() + view_.evicted_bits.capacity()) * 8 +
                  column_of_.capacity() * 4 + view_.tile_table.capacity() * 2 +
                  (table_f32_.capacity() + partial_.capacity() + parts_left_.capacity()) * 4;
  m->workspace += view_.packed.memory() + view_.apart.memory();
  for (const View::Tiles& tiles : view_.stages) m->workspace += tiles.memory();
  for (const auto& cells : view_.apart_cells) m->workspace += cells.capacity() * 8;
  for (const auto& space : thread_space_) m->workspace += space.capacity() * 4;
  for (const SealSpace& space : seal_space_) {
    m->workspace += (space.rows.capacity() + space.after.capacity()) * 2 + space.passed.capacity() +
                    space.batch.bytes();
  }
  for (const auto& [cell, layers] : queries_) {
    for (const auto& row : layers) m->workspace += row.capacity() * 2;
  }
  m->resident = packed + slots + m->tables + m->cells + m->workspace;
  m->peak = std::max<uint64_t>(peak_, m->resident);
  m->f16_bytes = uint64_t(m->tokens) * (k_row + v_row) * 2;
  if (m->tokens > 0) {
    const double keys = double(key_rows + m->dense_keys),
                 values = double(value_rows + m->dense_values);
    const double shared = double(m->cells + m->slack), share = keys / (keys + values);
    m->key_bits =
        8.0 * (keys + double(m->tables) + shared * share) / (double(m->tokens) * double(k_row));
    m->value_bits = 8.0 * (values + shared * (1.0 - share)) / (double(m->tokens) * double(v_row));
    m->bits = (m->key_bits * double(k_row) + m->value_bits * double(v_row)) / double(k_row + v_row);
    if (baseline_.codec != Codec::kNone) CountBaseline(m);
  }
}

void KvCache::NotePeak() {
  sparkv_memory m{};
  Memory(&m);
  peak_ = m.peak;
}

void KvCache::NoteHighWater() {
  if (n_sealed_ + n_dense_ + n_evicted_ < high_water_.tokens) return;
  Memory(&high_water_);
}

void KvCache::HighWater(sparkv_memory* m) const {
  const uint32_t struct_size = m->struct_size;
  const_cast<KvCache*>(this)->FinishStep();
  *m = high_water_;
  m->struct_size = struct_size;
  m->peak = peak_;
}

}  // namespace sparkv

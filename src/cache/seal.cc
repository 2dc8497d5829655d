// Observe and seal: queries become weights, rows that leave the window become packed rows. Layer by
// layer, from the arena and from dense slots.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/half.h"
#include "cache/kv_cache.h"
#include "method/observe.h"

namespace sparkv {

// f16 numbers, of all heads, of a column in flight or in the window.
const uint16_t* KvCache::WindowNumbers(const LayerLayout& layer, const Column& column,
                                       bool keys) const {
  if (column.flight >= 0) {
    return keys ? flight_keys_.data() + size_t(column.flight) * layer.k_row()
                : flight_values_.data() + size_t(column.flight) * layer.v_row();
  }
  return WindowRow(layer, column.slot, keys);
}

void KvCache::ReadColumn(const LayerLayout& layer, const Column& column, bool keys,
                         uint16_t* row) const {
  if (column.flight < 0 && column.stage > 0) {
    return Decode(layer, column.stage, cells_.table(column.cell), keys,
                  StageRows(layer, column.stage, column.slot, keys), row);
  }
  std::memcpy(row, WindowNumbers(layer, column, keys), (keys ? layer.k_row() : layer.v_row()) * 2);
}

// Query heads of a cell in flight.
const uint8_t* KvCache::FlightQuery(const sparkv_attend_args& args, int64_t cell) const {
  const int64_t flight = flight_at_.at(cell);
  return reinterpret_cast<const uint8_t*>(args.q) +
         size_t(flight / args.n_tokens) * args.q_stream_stride +
         size_t(flight % args.n_tokens) * args.q_token_stride;
}

// What the queries of a cell in flight add to the energies of channels, [k_row].
void KvCache::QueryEnergies(const sparkv_attend_args& args, int64_t cell, sparkv_group how,
                            float* energies) const {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  const int dim = layer.k_dim(), group = args.n_heads / layer.n_kv_heads;
  const uint8_t* q = FlightQuery(args, cell);
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    QueryEnergy(reinterpret_cast<const float*>(q + size_t(h * group) * args.q_head_stride),
                args.q_head_stride / sizeof(float), group, dim, how,
                energies + size_t(h) * size_t(dim));
  }
}

// Weights of one head from energies of its channels, [k_dim]; those of keys only for tiers.
void KvCache::FillTable(const LayerLayout& layer, uint16_t id, int head, const float* queries,
                        const float* keys) {
  const int dim = layer.k_dim();
  uint16_t* restore = tables_.at(id)->a.data() + layer.table_at + size_t(head) * size_t(dim);
  if (layer.key.tiered()) return MakeTierTable(queries, keys, dim, restore);
  std::vector<float> u(queries, queries + dim);
  for (float& x : u) x = std::sqrt(x);
  MakeTable(layer.key.recover, u.data(), dim, restore);
}

// Keys, of all heads, of the tokens whose queries make the weights. Sinks stay dense and have no
// say unless there is nothing else.
std::vector<uint16_t> KvCache::TableKeys(const LayerLayout& layer, const NewTable& table) const {
  const bool only_sinks = table.queries.back().first < config_.sinks;
  std::vector<uint16_t> keys;
  for (const auto& [rank, cell] : table.queries) {
    const auto flight = flight_at_.find(cell);
    const bool flies = flight != flight_at_.end();
    if ((rank < config_.sinks && !only_sinks) ||
        (!flies && (cells_.state(cell) != CellState::kDense || cells_.stage(cell) > 0)))
      continue;
    const Column column{cell, rank, flies ? flight->second : -1, cells_.stage(cell),
                        cells_.slot(cell)};
    keys.resize(keys.size() + layer.k_row());
    ReadColumn(layer, column, true, keys.data() + keys.size() - layer.k_row());
  }
  return keys;
}

// energy: of queries, [k_row]; changed.
void KvCache::MakeTiers(const LayerLayout& layer, const NewTable& table,
                        const sparkv_attend_args& args, float* energy) {
  const int dim = layer.k_dim();
  const std::vector<uint16_t> keys = TableKeys(layer, table);
  std::vector<float> key_energy(static_cast<size_t>(dim));
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    const size_t at = size_t(h) * size_t(dim);
    for (size_t j = 0; j < size_t(dim); ++j) {
      double sum = 0.0;
      for (size_t key = 0; key < keys.size(); key += layer.k_row()) {
        const double x = HalfToFloat(keys[key + at + j]);
        sum += x * x;
      }
      key_energy[j] = float(sum);
    }
    ShareInPairs(energy + at, dim, args.rope_rot, args.rope_neox != 0);
    ShareInPairs(key_energy.data(), dim, args.rope_rot, args.rope_neox != 0);
    FillTable(layer, table.id, h, energy + at, key_energy.data());
  }
}

// The energies of the queries of this layer go where a table, now or later, asks for them. Sums run
// in order of rank, so weights do not depend on how the queries arrived.
void KvCache::MakeTables(const sparkv_attend_args& args) {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  if (!layer.has_table) return;
  // Weights of tiers are scales of numbers, not ranks alone: heads must not cancel.
  const sparkv_group how = layer.key.tiered() ? SPARKV_GROUP_ENERGY : sparkv_group(config_.group);
  const size_t n = layer.k_row();
  std::vector<float> one(n), u(n);
  for (const NewTable& table : step_.new_tables) {
    std::fill(u.begin(), u.end(), 0.0f);
    for (const auto& [rank, cell] : table.queries) {
      const float* e = one.data();
      if (const auto kept = observed_.find(cell); kept != observed_.end()) {
        e = kept->second.data() + layer.channel_at;
      } else {
        QueryEnergies(args, cell, how, one.data());
      }
      for (size_t j = 0; j < n; ++j) u[j] += e[j];
    }
    if (layer.key.tiered()) {
      MakeTiers(layer, table, args, u.data());
      continue;
    }
    if (!layer.key.needs_table()) {
      for (float& x : u) x = std::sqrt(x);
      MakeChannels(layer, table, u.data());
      continue;
    }
    for (int h = 0; h < layer.n_kv_heads; ++h)
      FillTable(layer, table.id, h, u.data() + size_t(h) * size_t(layer.k_dim()), nullptr);
  }
  for (const int64_t cell : step_.observed) {
    std::vector<float>& kept = observed_[cell];
    kept.resize(layout_.channels);
    QueryEnergies(args, cell, how, kept.data() + layer.channel_at);
  }
}

// Rows that have become older enter their stages, or are packed. A row is coded by every stage on
// its way, also where no query sees it there: what it becomes does not depend on how the host cuts
// a prompt. ExpandTables(layer) was called.
void KvCache::SealLayer(int layer_index) {
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  if (baseline_.codec != Codec::kNone) return SealBaseline(layer);
  const int n_stages = layout_.n_stages();
  RowErrors* errors = errors_.empty() ? nullptr : &errors_[size_t(layer_index)];
  const auto body = [&](int64_t begin, int64_t count, SealSpace* space) {
    const Column* columns = step_.aging.data() + begin;
    std::vector<uint16_t>&rows = space->rows, &after = space->after;
    std::vector<uint8_t>& passed = space->passed;
    RowBatch& batch = space->batch;
    for (const bool keys : {true, false}) {
      const size_t row = keys ? layer.k_row() : layer.v_row();
      rows.resize(size_t(count) * row);
      after.resize(row);
      const auto row_at = [&](int64_t i) { return rows.data() + size_t(i) * row; };
      for (int64_t i = 0; i < count; ++i) ReadColumn(layer, columns[i], keys, row_at(i));
      for (int stage = 1; stage < n_stages; ++stage) {
        const StageLayout& coded_rows = layer.stages[size_t(stage)];
        const size_t bytes = keys ? coded_rows.key.bytes : coded_rows.value.bytes;
        const size_t n_heads = size_t(layer.n_kv_heads);
        passed.resize(size_t(count) * bytes * n_heads);
        const auto enters = [&](const Column& c) {
          return stage > c.stage && (c.sealing || c.enters >> stage != 0);
        };
        const auto coded = [&](int64_t i) {
          const int32_t slot = columns[i].coded[size_t(stage)];
          return slot < 0 ? HeadRows{passed.data() + size_t(i) * bytes * n_heads, bytes}
                          : StageRows(layer, stage, slot, keys);
        };
        for (int64_t i = 0; i < count; ++i) {
          if (enters(columns[i]))
            AddCodedRow(layer, stage, columns[i].table, keys, row_at(i), coded(i), &batch);
        }
        PackBatch(coded_rows.value, keys, &batch);
        for (int64_t i = 0; i < count; ++i) {
          const Column& c = columns[i];
          const bool goes_on = c.sealing || c.enters >> stage > 1;
          if (!enters(c) || (!goes_on && errors == nullptr)) continue;
          Decode(layer, stage, c.table, keys, coded(i), after.data());
          if (errors != nullptr) errors->Add(keys, stage - 1, stage == 1, row_at(i), after.data());
          std::copy(after.begin(), after.end(), row_at(i));
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        if (columns[i].sealing)
          AddPackedRow(layer, columns[i].cell, columns[i].table, keys, row_at(i), &batch);
      }
      PackBatch(layer.value, keys, &batch);
      for (int64_t i = 0; i < count && errors != nullptr; ++i) {
        if (!columns[i].sealing) continue;
        ReadPacked(keys, layer, columns[i].cell, columns[i].table, after.data());
        errors->Add(keys, n_stages - 1, n_stages == 1, row_at(i), after.data());
      }
    }
  };
  EachChunk(int64_t(step_.aging.size()), errors != nullptr, body);
}

Status KvCache::StartErrors() {
  if (baseline_.codec != Codec::kNone)
    return Status::Invalid("errors: does not go with a baseline");
  errors_.clear();
  for (const LayerLayout& layer : layout_.layers) errors_.emplace_back(layer, layout_.n_stages());
  return Status::Ok();
}

void KvCache::CountQueries(const sparkv_attend_args& args) {
  std::vector<float> energies(layout_.layers[size_t(args.layer)].k_row());
  for (int64_t i = 0; i < args.n_streams * args.n_tokens; ++i) {
    const int64_t cell = FlightOf(args, int(i / args.n_tokens), i % args.n_tokens);
    if (cell < 0) continue;
    QueryEnergies(args, cell, SPARKV_GROUP_ENERGY, energies.data());
    errors_[size_t(args.layer)].AddQueries(energies.data());
  }
}

// Rows in flight that stay dense move from the arena to their slots.
void KvCache::KeepDense(int layer_index) {
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  for (size_t i = 0; i < flight_cells_.size(); ++i) {
    const int64_t cell = flight_cells_[i];
    if (cell < 0 || cells_.slot(cell) < 0) continue;
    const int32_t slot = cells_.slot(cell);
    std::memcpy(WindowRow(layer, slot, true), flight_keys_.data() + i * layer.k_row(),
                layer.k_row() * 2);
    std::memcpy(WindowRow(layer, slot, false), flight_values_.data() + i * layer.v_row(),
                layer.v_row() * 2);
  }
}

}  // namespace sparkv

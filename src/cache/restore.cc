// Rows that come from outside as f16: state files, copies of streams, keys that move.
//
// A packed row that was read as f16 packs to the same bytes again under its own weights and, in
// practice, under no others. So weights need no name in a state file: the known table under which a
// key row is a fixed point is the one it was packed with.
#include <algorithm>
#include <cstring>

#include "base/checksum.h"
#include "base/half.h"
#include "cache/kv_cache.h"
#include "cache/rope.h"

namespace sparkv {

bool KvCache::PacksToItself(const LayerLayout& layer, int stage, uint16_t table_id,
                            const uint16_t* row) {
  uint8_t packed[2 * kMaxHeadDim + 128];
  uint16_t again[kMaxHeadDim];
  for (int h = 0; h < layer.n_kv_heads; ++h) {
    const size_t at = size_t(h) * size_t(layer.k_dim());
    const KeyForm key = FormOf(layer, stage, table_id, h);
    const uint16_t* k = row + at;
    uint8_t* to = packed;
    ops_->pack_keys(*key.layout, 1, &key.weights, &k, &to);
    ops_->unpack_key(*key.layout, key.weights, packed, again);
    for (int j = 0; j < layer.k_dim(); ++j) {
      if (again[j] != row[at + size_t(j)] && ((again[j] | row[at + size_t(j)]) & 0x7fffu) != 0)
        return false;
    }
  }
  return true;
}

// The known weights under which this key row is a fixed point of a stage's, 0: none.
uint16_t KvCache::MatchTable(const LayerLayout& layer, int stage, const uint16_t* row) {
  if (!layer.key_of(stage).needs_table()) return 0;
  if (EvictedHeads(layer, row) == layer.n_kv_heads) return restore_.matched;
  // Neighbours mostly share their weights, so the last match is tried first.
  if (restore_.matched != 0 && PacksToItself(layer, stage, restore_.matched, row))
    return restore_.matched;
  for (const uint16_t id : tables_.Known()) {
    if (id != restore_.matched && PacksToItself(layer, stage, id, row)) return id;
  }
  return 0;
}

// Decides at the first key row of a cell that has weights whether the cell is packed; the other
// layers and the values follow. Layers without weights that came before wait in the dense slot.
Status KvCache::PlaceRestored(int layer_index, int64_t cell, const uint16_t* row) {
  cells_.Touch(cell);
  ReleaseCell(cell);
  int64_t& end = used_end_[size_t(layout_.stream_of(cell))];
  end = std::max(end, layout_.index_of(cell) + 1);
  cells_.order(cell) = next_order_++;
  cells_.rank(cell) = -1;
  cells_.distinct(cell) = 0;
  unranked_ = true;

  if (Status s = AddDense(cell); !s.ok()) return s;
  cells_.set_state(cell, CellState::kDense);
  return DecideRestored(layer_index, cell, row);
}

Status KvCache::DecideRestored(int layer_index, int64_t cell, const uint16_t* row) {
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  const uint16_t table = MatchTable(layer, layout_.n_stages(), row);
  if (table == 0) {
    // Behind rows that were recognised it is younger and of the same sequence.
    if (restore_.range_matched) SetTable(cell, restore_.matched);
    return EnterStage(layer, cell, row);
  }
  restore_.matched = table;
  restore_.range_matched = true;
  SetTable(cell, table);
  tables_.Used(table);
  AddPacked(cell);
  for (const auto& [index, keys] : restore_.rows) {
    const LayerLayout& layer = layout_.layers[size_t(index)];
    const auto* dense = WindowRow(layer, cells_.slot(cell), keys);
    PackRow(layer, cell, 0, keys ? dense : nullptr, keys ? nullptr : dense);
  }
  SealRestored(cell);
  return Status::Ok();
}

// A restored cell whose key row is a fixed point of a stage goes there: on the way that younger
// rows take it would be coded by the stages before as well.
Status KvCache::EnterStage(const LayerLayout& layer, int64_t cell, const uint16_t* row) {
  for (int stage = layout_.n_stages() - 1; stage > 0; --stage) {
    const uint16_t table = MatchTable(layer, stage, row);
    if (layer.key_of(stage).needs_table() ? table == 0 : !PacksToItself(layer, stage, 0, row))
      continue;
    if (table != 0) {
      restore_.matched = table;
      restore_.range_matched = true;
      SetTable(cell, table);
      tables_.Used(table);
    }
    const int32_t slot = cells_.slot(cell);
    if (Status s = TakeSlot(cell, stage); !s.ok()) return s;
    for (const auto& [index, keys] : restore_.rows) {
      const LayerLayout& before = layout_.layers[size_t(index)];
      Code(before, stage, 0, keys, WindowRow(before, slot, keys),
           StageRows(before, stage, cells_.slot(cell), keys));
    }
    stores_[0].Free(slot);
    --in_stage_[0];
    ++in_stage_[size_t(stage)];
    return Status::Ok();
  }
  return Status::Ok();
}

// A dense cell whose rows are in the packed store by now.
void KvCache::SealRestored(int64_t cell) {
  RemoveDense(cell);
  cells_.set_state(cell, CellState::kSealed);
  ++n_sealed_;
}

void KvCache::SetTable(int64_t cell, uint16_t table) {
  tables_.Ref(table);
  tables_.Unref(cells_.table(cell));
  cells_.table(cell) = table;
}

Status KvCache::Restore(bool keys, int layer_index, int64_t first, int64_t n,
                        const uint16_t* rows) {
  FinishStep();
  copy_ = {};
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  if (!restore_.open) {
    restore_ = {};
    restore_.open = true;
    restore_.first_layer = layer_index;
  }
  if (keys && restore_.deciding < 0 && (layer.key.needs_table() || !needs_weights_))
    restore_.deciding = layer_index;
  const bool placing = keys && layer_index == restore_.deciding;
  if (placing) restore_.range_matched = false;
  ExpandTables(layer_index, placing);
  const size_t row_numbers = keys ? layer.k_row() : layer.v_row();
  // A row that all heads evicted packs to itself under any weights: another one must tell them.
  for (int64_t i = 0; i < n && placing && restore_.matched == 0; ++i) {
    const uint16_t* row = rows + size_t(i) * row_numbers;
    restore_.matched = MatchTable(layer, layout_.n_stages(), row);
  }
  std::vector<int64_t> cells;
  Status placed = Status::Ok();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t cell = first + i;
    const uint16_t* row = rows + size_t(i) * row_numbers;
    const bool known = restore_.cells.count(cell) != 0;
    if (keys && (!known || layer_index == restore_.first_layer)) {
      placed = PlaceRestored(layer_index, cell, row);
      if (placed.ok()) restore_.cells.insert(cell);
    } else if (placing) {
      placed = DecideRestored(layer_index, cell, row);
    }
    if (placed.ok() && cells_.state(cell) != CellState::kSealed &&
        cells_.state(cell) != CellState::kDense)
      placed = Status::Invalid("values: cell " + std::to_string(cell) + " was given no keys");
    if (!placed.ok()) break;
    if (keys && EvictedHeads(layer, row) > 0) restore_.evicted.insert(cell);
    cells.push_back(cell);
  }
  // Where memory ran out, cells that were placed have their rows.
  EachChunk(int64_t(cells.size()), false, [&](int64_t begin, int64_t count, SealSpace* space) {
    StoreRows(layer, keys, count, cells.data() + begin, rows + size_t(begin) * row_numbers,
              &space->batch);
  });
  if (!placed.ok()) return placed;
  for (int64_t i = 0; i < n && placing && !restore_.range_matched; ++i)
    restore_.strangers.push_back(first + i);
  if (restore_.deciding < 0) restore_.rows.insert({layer_index, keys});
  return Status::Ok();
}

// The rows of a restore that no known weights reproduce. Beside rows that were recognised they are
// the window and the sinks of the same sequence, which were dense before. Alone, and with packed
// values, they were packed by a process whose weights are gone: packing them again would lose more,
// so they stay dense, and the host is told how many.
void KvCache::EndRestore() {
  if (!restore_.open) return;
  restore_.open = false;
  const LayerLayout& layer = layout_.layers[size_t(std::max(0, restore_.deciding))];
  if (needs_weights_) {
    std::vector<uint16_t> again(layer.v_row());
    std::vector<uint8_t> packed(layer.value.bytes);
    for (const int64_t cell : restore_.strangers) {
      if (cells_.state(cell) != CellState::kDense || cells_.stage(cell) > 0 ||
          cells_.pinned(cell) != 0)
        continue;
      // Values that do not pack to themselves were never packed: a plain state file, free to be
      // packed.
      bool raw = false;
      const auto* values = WindowRow(layer, cells_.slot(cell), false);
      for (int h = 0; h < layer.n_kv_heads && !raw && layer.value.rotated(); ++h) {
        const uint16_t* v = values + size_t(h) * size_t(layer.v_dim());
        uint8_t* to = packed.data();
        ops_->pack_values(layer.value, 1, &v, &to);
        ops_->unpack_value(layer.value, packed.data(), again.data());
        raw = std::memcmp(again.data(), v, size_t(layer.v_dim()) * 2) != 0;
      }
      if (raw) continue;
      cells_.pinned(cell) = 1;
      ++unknown_rows_;
    }
  }
  if (!restore_.evicted.empty()) EvictRestored();
  restore_ = {};
  NotePeak();
  NoteHighWater();
}

Status KvCache::CopyStream(bool keys, int layer_index, int from, int to) {
  FinishStep();
  EndRestore();
  if (from == to) return Status::Ok();
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  const int64_t n = layout_.cells_per_stream, source = from * n, target = to * n;
  const int step = layer_index * 2 + (keys ? 1 : 0);
  if (copy_.from != from || copy_.to != to || !copy_.done.insert(step).second) {
    // A new copy: the target takes over what the source is; rows follow, layer by layer.
    copy_ = {from, to, {step}};
    latest_until_ = 0;  // copies are as new as their sources
    for (int64_t i = 0; i < used_end_[size_t(to)]; ++i) ReleaseCell(target + i);
    used_end_[size_t(to)] = used_end_[size_t(from)];
    const auto mirror = [&](int64_t i) {
      const int64_t a = source + i, b = target + i;
      cells_.Touch(b);
      cells_.set_state(b, cells_.state(a));
      cells_.pinned(b) = cells_.pinned(a);
      cells_.rank(b) = cells_.rank(a);
      cells_.distinct(b) = cells_.distinct(a);
      cells_.order(b) = cells_.order(a);
      cells_.table(b) = cells_.table(a);
      tables_.Ref(cells_.table(b));
      if (const auto queries = observed_.find(a); queries != observed_.end()) {
        std::vector<float> copy = queries->second;
        observed_[b] = std::move(copy);
      }
    };
    for (const int64_t cell : dense_cells_[size_t(from)]) {
      const int64_t i = layout_.index_of(cell);
      cells_.Touch(target + i);
      if (Status s = AddDense(target + i, cells_.stage(cell)); !s.ok()) return s;
      mirror(i);
    }
    for (int64_t i = 0; i < used_end_[size_t(from)]; ++i) {
      const CellState state = cells_.state(source + i);
      if (state != CellState::kSealed && state != CellState::kEvicted) continue;
      mirror(i);
      if (state == CellState::kEvicted) {
        EvictedWord(target + i) |= uint64_t{1} << (i % 64);
        ++n_evicted_;
        continue;
      }
      AddPacked(target + i);
      ++n_sealed_;
    }
    for (const LayerLayout& l : layout_.layers) {
      for (int h = 0; h < l.n_kv_heads; ++h) Kept(to, l, h) = Kept(from, l, h);
    }
    CountKept();
    NotePeak();
    NoteHighWater();
  }
  for (int64_t i = 0; i < used_end_[size_t(from)]; ++i) {
    const int64_t a = source + i, b = target + i;
    if (cells_.state(a) == CellState::kSealed) {
      for (int h = 0; h < layer.n_kv_heads; ++h) {
        if (keys) {
          std::memcpy(packed_.data() + layout_.key_at(layer, h, b),
                      packed_.data() + layout_.key_at(layer, h, a), layer.key.bytes);
        } else {
          std::memcpy(packed_.data() + layout_.value_at(layer, h, b),
                      packed_.data() + layout_.value_at(layer, h, a), layer.value.bytes);
        }
      }
    } else if (cells_.state(a) == CellState::kDense) {
      const int stage = cells_.stage(a);
      CopySlot(layer, stage, cells_.slot(a), cells_.slot(b), keys);
    }
  }
  return Status::Ok();
}

Status KvCache::RotateKeys(int layer_index, const int32_t* delta, int64_t n_cells,
                           const sparkv_rope& rope) {
  FinishStep();
  EndRestore();
  copy_ = {};
  const LayerLayout& layer = layout_.layers[size_t(layer_index)];
  ExpandTables(layer_index);
  std::vector<int64_t> cells;
  for (int64_t cell = 0; cell < std::min(n_cells, layout_.cells()); ++cell) {
    if (delta[cell] == 0 || cells_.state(cell) == CellState::kEmpty) continue;
    cells.push_back(cell);
    queries_.erase(cell);
  }
  EachChunk(int64_t(cells.size()), false, [&](int64_t begin, int64_t count, SealSpace* space) {
    const size_t dim = size_t(layer.k_dim()), row = layer.k_row();
    std::vector<uint16_t> rows(size_t(count) * row);
    std::vector<float> k(dim);
    for (size_t i = 0; i < size_t(count); ++i) {
      const int64_t cell = cells[size_t(begin) + i];
      ReadCell(true, layer, cell, &rows[i * row]);
      for (size_t at = i * row; at < (i + 1) * row; at += dim) {
        for (size_t j = 0; j < dim; ++j) k[j] = HalfToFloat(rows[at + j]);
        RotatePosition(rope, delta[cell], k.data());
        for (size_t j = 0; j < dim; ++j) rows[at + j] = FloatToHalf(k[j]);
      }
    }
    StoreRows(layer, true, count, cells.data() + begin, rows.data(), &space->batch);
  });
  return Status::Ok();
}

// ---- weights as bytes (docs/format.md, "weights") ----

namespace {

constexpr char kMagic[8] = {'s', 'p', 'a', 'r', 'k', 'v', 'w', '2'};

struct WeightsHeader {
  char magic[8];
  uint64_t fingerprint;  // of shape and key configuration
  uint64_t checksum;     // of everything behind the header
  uint32_t n_tables;
  uint32_t n_numbers;  // f16 numbers per table
};
static_assert(sizeof(WeightsHeader) == 32);

}  // namespace

uint64_t KvCache::Fingerprint() const {
  uint64_t hash = Fnv1a(&config_.recover, sizeof(config_.recover));
  for (const LayerLayout& layer : layout_.layers) {
    const int32_t numbers[4] = {layer.n_kv_heads, layer.key.head_dim, layer.key.kept,
                                int32_t(layer.key.number)};
    hash = Fnv1a(numbers, sizeof(numbers), hash);
  }
  return hash;
}

size_t KvCache::SaveWeights(void* bytes, size_t size) const {
  const std::vector<uint16_t> known = tables_.Known();
  const size_t table_bytes = layout_.table_numbers * 2;
  const size_t needed = sizeof(WeightsHeader) + known.size() * table_bytes;
  if (size < needed || bytes == nullptr) return needed;
  uint8_t* out = static_cast<uint8_t*>(bytes) + sizeof(WeightsHeader);
  for (const uint16_t id : known) {
    std::memcpy(out, tables_.at(id)->a.data(), table_bytes);
    out += table_bytes;
  }
  WeightsHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.fingerprint = Fingerprint();
  header.n_tables = uint32_t(known.size());
  header.n_numbers = uint32_t(layout_.table_numbers);
  header.checksum =
      Fnv1a(static_cast<uint8_t*>(bytes) + sizeof(header), known.size() * table_bytes);
  std::memcpy(bytes, &header, sizeof(header));
  return needed;
}

Status KvCache::LoadWeights(const void* bytes, size_t size) {
  WeightsHeader header;
  if (size < sizeof(header))
    return Status::Corrupt("weights: " + std::to_string(size) + " bytes are no header");
  std::memcpy(&header, bytes, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    return Status::Corrupt("weights.magic: not sparkvw2");
  if (header.fingerprint != Fingerprint() || header.n_numbers != layout_.table_numbers) {
    return Status::Invalid(
        "weights.fingerprint: made for another model shape or another key configuration");
  }
  const size_t table_bytes = layout_.table_numbers * 2;
  if (header.n_tables > 65535 || size - sizeof(header) != size_t(header.n_tables) * table_bytes) {
    return Status::Corrupt("weights.n_tables: " + std::to_string(header.n_tables) +
                           " tables do not fit " + std::to_string(size) + " bytes");
  }
  const uint8_t* in = static_cast<const uint8_t*>(bytes) + sizeof(header);
  if (header.checksum != Fnv1a(in, size - sizeof(header)))
    return Status::Corrupt("weights.checksum: bytes are damaged");
  // Anything that is not finite would reach keys.
  for (size_t i = 0; i < size - sizeof(header); i += 2) {
    uint16_t a;
    std::memcpy(&a, in + i, 2);
    if ((a & 0x7c00u) == 0x7c00u)
      return Status::Corrupt("weights: number " + std::to_string(i / 2) + " is not finite");
  }
  // Oldest first, so that the newest is tried first again; the store keeps the newest ones.
  for (uint32_t t = header.n_tables; t-- > 0;) {
    if (tables_.Has(in + size_t(t) * table_bytes)) continue;
    const uint16_t id = tables_.Make();
    if (id == 0) return Status::NoMemory("weights: more than 65534 tables");
    std::memcpy(tables_.at(id)->a.data(), in + size_t(t) * table_bytes, table_bytes);
    tables_.Unref(id);
  }
  return Status::Ok();
}

}  // namespace sparkv

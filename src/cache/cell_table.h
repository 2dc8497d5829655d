// What is known about each cell. Arrays over all cells that are committed as cells come into use.
#pragma once

#include <cstdint>

#include "base/reserve.h"

namespace sparkv {

enum class CellState : uint8_t {
  kEmpty = 0,
  kFlight,   // written in the current micro-batch, not yet placed
  kDense,    // rows in a slot: of the window, or of a stage between it and the packed rows
  kSealed,   // packed rows
  kEvicted,  // packed rows in the heads that keep them (kept_rows.h)
};

class CellTable {
 public:
  Status Map(int64_t n_cells) {
    if (Status s = state_.Map(size_t(n_cells), "cells"); !s.ok()) return s;
    if (Status s = pinned_.Map(size_t(n_cells), "cells"); !s.ok()) return s;
    if (Status s = stage_.Map(size_t(n_cells), "cells"); !s.ok()) return s;
    if (Status s = table_.Map(size_t(n_cells) * 2, "cells"); !s.ok()) return s;
    if (Status s = rank_.Map(size_t(n_cells) * 4, "cells"); !s.ok()) return s;
    if (Status s = distinct_.Map(size_t(n_cells) * 4, "cells"); !s.ok()) return s;
    if (Status s = order_.Map(size_t(n_cells) * 4, "cells"); !s.ok()) return s;
    return slot_.Map(size_t(n_cells) * 4, "cells");
  }
  // Must be called before any field of the cell is written.
  void Touch(int64_t cell) {
    state_.Touch(size_t(cell), 1);
    pinned_.Touch(size_t(cell), 1);
    stage_.Touch(size_t(cell), 1);
    table_.Touch(size_t(cell) * 2, 2);
    rank_.Touch(size_t(cell) * 4, 4);
    distinct_.Touch(size_t(cell) * 4, 4);
    order_.Touch(size_t(cell) * 4, 4);
    slot_.Touch(size_t(cell) * 4, 4);
  }
  void Release() {
    for (Reserve* r : {&state_, &pinned_, &stage_, &table_, &rank_, &distinct_, &order_, &slot_})
      r->Release(0, r->size() + 4096);
  }
  size_t committed() const {
    size_t sum = 0;
    for (const Reserve* r :
         {&state_, &pinned_, &stage_, &table_, &rank_, &distinct_, &order_, &slot_})
      sum += r->committed();
    return sum;
  }

  CellState state(int64_t c) const { return CellState(state_.data()[c]); }
  void set_state(int64_t c, CellState s) { state_.data()[c] = uint8_t(s); }
  // A dense row that must never be packed (docs/design.md, "restore").
  uint8_t& pinned(int64_t c) { return pinned_.data()[c]; }
  // Which of the stages its slot is of, 0 = window; meaningful in state kDense.
  uint8_t& stage(int64_t c) { return stage_.data()[c]; }
  uint8_t stage(int64_t c) const { return stage_.data()[c]; }
  // Weight table its sequence packs with; 0 = none yet.
  uint16_t& table(int64_t c) { return reinterpret_cast<uint16_t*>(table_.data())[c]; }
  uint16_t table(int64_t c) const { return reinterpret_cast<const uint16_t*>(table_.data())[c]; }
  // Place in its sequence, 0 = first token; -1 = not known yet (restored).
  int32_t& rank(int64_t c) { return reinterpret_cast<int32_t*>(rank_.data())[c]; }
  int32_t rank(int64_t c) const { return reinterpret_cast<const int32_t*>(rank_.data())[c]; }
  // How many tokens of its sequence up to this one differ from all before them; negative: this one
  // repeats one of them; 0: not counted, because its sequence has weights or was restored.
  int32_t& distinct(int64_t c) { return reinterpret_cast<int32_t*>(distinct_.data())[c]; }
  // When it was written; larger is newer. Unique within a stream.
  uint32_t& order(int64_t c) { return reinterpret_cast<uint32_t*>(order_.data())[c]; }
  // Slot of its stage, meaningful in state kDense.
  int32_t& slot(int64_t c) { return reinterpret_cast<int32_t*>(slot_.data())[c]; }
  int32_t slot(int64_t c) const { return reinterpret_cast<const int32_t*>(slot_.data())[c]; }

 private:
  Reserve state_, pinned_, stage_, table_, rank_, distinct_, order_, slot_;
};

}  // namespace sparkv

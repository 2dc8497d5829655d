// Channel weights: one table per sequence, made once from its first queries and never changed. Cells refer to tables by number.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "cache/cache_layout.h"

namespace sparkv {

// f16 a[channel] for every layer and KV head: what a pruned or integer channel is multiplied with.
struct WeightTable {
  std::vector<uint16_t> a;  // [table_channels]
  int64_t refs = 0;         // cells that refer to it
  uint64_t last_use = 0;
};

class WeightTables {
 public:
  void Init(size_t channels) { channels_ = channels; }

  // A new table with one reference held by the caller until Unref; 0 when all numbers are taken.
  uint16_t Make();
  void Ref(uint16_t id) {
    if (id != 0) ++tables_[id]->refs;
  }
  // A table without references is kept for a while: a state file may bring its rows back.
  void Unref(uint16_t id);
  void Clear();  // drops every reference; the tables stay known

  WeightTable* at(uint16_t id) const { return tables_[id].get(); }
  // Known tables, newest use first.
  std::vector<uint16_t> Known() const;
  void Used(uint16_t id) { tables_[id]->last_use = ++clock_; }
  size_t bytes() const { return n_tables_ * channels_ * sizeof(uint16_t); }
  size_t count() const { return tables_.size(); }

 private:
  static constexpr size_t kIdle = 8;  // tables kept without references
  void DropIdle();

  size_t channels_ = 0;
  std::vector<std::unique_ptr<WeightTable>> tables_{1};  // index = number; entry 0 stays empty
  size_t n_tables_ = 0;
  uint64_t clock_ = 0;
};

// u [head_dim] -> a [head_dim] f16 such that z = k / a is what the configuration ranks by (docs/format.md, "weights").
void MakeTable(sparkv_recover recover, const float* u, int head_dim, uint16_t* a);
// f32 copies for the kernels: a, and weight = 1 / a (0 where a is 0).
void ExpandTable(const uint16_t* a, int n, float* table, float* weight);

}  // namespace sparkv

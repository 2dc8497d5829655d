// Channel weights: one table per sequence, made once from its first queries and never changed.
// Cells refer to tables by number.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "cache/cache_layout.h"

namespace sparkv {

// For every layer and KV head that prunes, f16 restore [k_dim] (format/row_layout.h).
struct WeightTable {
  std::vector<uint16_t> a;  // [table_numbers]
  int64_t refs = 0;         // cells that refer to it
  uint64_t last_use = 0;
};

class WeightTables {
 public:
  void Init(size_t numbers) { numbers_ = numbers; }

  // A new table with one reference held by the caller until Unref; 0 when all numbers are taken.
  uint16_t Make();
  void Ref(uint16_t id) {
    if (id != 0) ++tables_[id]->refs;
  }
  // A table without references is kept for a while: a state file may bring its rows back.
  void Unref(uint16_t id);
  void Clear(uint16_t held);  // drops every reference but one to `held`; the tables stay known

  WeightTable* at(uint16_t id) const { return tables_[id].get(); }
  // Tables that cells refer to, and all tables, newest use first.
  std::vector<uint16_t> Live() const { return Numbers(1); }
  std::vector<uint16_t> Known() const { return Numbers(0); }
  bool Has(const void* numbers) const;  // among all tables, bit for bit
  void Used(uint16_t id) { tables_[id]->last_use = ++clock_; }
  size_t bytes() const { return n_tables_ * numbers_ * sizeof(uint16_t); }
  size_t count() const { return tables_.size(); }

 private:
  // Tables kept without references: hundreds of conversations that a server put away may come back.
  static constexpr size_t kIdleBytes = size_t{8} << 20;
  void DropIdle();
  std::vector<uint16_t> Numbers(int64_t least_refs) const;

  size_t numbers_ = 0;
  std::vector<std::unique_ptr<WeightTable>> tables_{1};  // index = number; entry 0 stays empty
  size_t n_tables_ = 0;
  uint64_t clock_ = 0;
};

// Weights of one head from u [head_dim] of its queries (method/observe.h): restore, f16 [head_dim].
void MakeTable(sparkv_recover recover, const float* u, int head_dim, uint16_t* restore);
// The same for tiers, from sums of squares over queries and over keys, [head_dim] each: weight[j] =
// root of the query energy, scaled so that weighted keys have a mean square of 1; channels go to
// tiers by falling q[j]^2 k[j]^2, the smaller channel first where equal. The weights hold how the
// energy of weighted keys falls from tier to tier, too (format/tier_bits.h).
void MakeTierTable(const float* query_energy, const float* key_energy, int head_dim,
                   uint16_t* restore);
// restore of one head -> f32 KeyWeights [kWeightParts][head_dim].
void ExpandTable(const uint16_t* restore, int head_dim, float* out);

}  // namespace sparkv

// Packed rows in groups of cells (cache_layout.h). A group is committed by its first row and given
// back with its last.
#pragma once

#include <cstdint>
#include <vector>

#include "base/reserve.h"

namespace sparkv {

class PackedStore {
 public:
  Status Map(size_t group_bytes, int64_t n_groups) {
    group_bytes_ = group_bytes;
    rows_.assign(size_t(n_groups), 0);
    return region_.Map(group_bytes * size_t(n_groups), "packed rows");
  }
  void Add(int64_t group) {
    if (rows_[size_t(group)]++ == 0) region_.Touch(size_t(group) * group_bytes_, group_bytes_);
  }
  void Remove(int64_t group) {
    if (--rows_[size_t(group)] != 0) return;
    // Pages shared with a neighbour go only when the neighbour is empty too.
    size_t first = size_t(group), last = size_t(group) + 1;
    while (first > 0 && rows_[first - 1] == 0 && (size_t(group) - first) * group_bytes_ < 4096)
      --first;
    while (last < rows_.size() && rows_[last] == 0 &&
           (last - size_t(group) - 1) * group_bytes_ < 4096)
      ++last;
    const size_t tail = last == rows_.size() ? 4095 : 0;
    region_.Release(first * group_bytes_, (last - first) * group_bytes_ + tail);
  }
  void Clear() {
    rows_.assign(rows_.size(), 0);
    region_.Release(0, region_.size() + 4095);
  }
  uint8_t* data() const { return region_.data(); }
  size_t committed() const { return region_.committed(); }
  size_t bookkeeping() const { return rows_.size() + region_.bookkeeping(); }

 private:
  Reserve region_;
  size_t group_bytes_ = 0;
  std::vector<uint8_t> rows_;  // packed cells per group
};

}  // namespace sparkv

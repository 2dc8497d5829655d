// The packed rows that one KV head of a layer keeps of evicted cells, in order of cells.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "cache/cache_layout.h"

namespace sparkv {

struct KeptRows {
  std::vector<uint64_t> cells;  // bit: the cell of this index in its stream has a row here
  std::vector<uint8_t> rows;    // runs of 16 as in the packed store: 16 key rows, 16 value rows
  int64_t count = 0;

  // Kernels may read this far past a row (ops/op_table.h).
  static constexpr size_t kReadAhead = 128;

  void Resize(const LayerLayout& layer, int64_t n) {
    count = n;
    const size_t runs = size_t((n + kGroupCells - 1) / kGroupCells);
    rows.assign(runs == 0 ? 0 : runs * layer.head_group_bytes() + kReadAhead, 0);
    rows.shrink_to_fit();
  }
  uint8_t* key(const LayerLayout& layer, int64_t i) const {
    return const_cast<uint8_t*>(rows.data()) + size_t(i / kGroupCells) * layer.head_group_bytes() +
           size_t(i % kGroupCells) * layer.key.bytes;
  }
  uint8_t* value(const LayerLayout& layer, int64_t i) const {
    return const_cast<uint8_t*>(rows.data()) + size_t(i / kGroupCells) * layer.head_group_bytes() +
           size_t(kGroupCells) * layer.key.bytes + size_t(i % kGroupCells) * layer.value.bytes;
  }
  // Place of the row of the cell with this index in its stream, -1: it has none.
  int64_t Find(int64_t index) const {
    const size_t word = size_t(index / 64);
    const uint64_t bit = uint64_t{1} << (index % 64);
    if (word >= cells.size() || (cells[word] & bit) == 0) return -1;
    int64_t at = std::popcount(cells[word] & (bit - 1));
    for (size_t w = 0; w < word; ++w) at += std::popcount(cells[w]);
    return at;
  }
};

}  // namespace sparkv

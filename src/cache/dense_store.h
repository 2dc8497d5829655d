// Rows that are not packed: slots of f16 numbers, one slot holds a token in all layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/reserve.h"

namespace sparkv {

class DenseStore {
 public:
  Status Map(size_t slot_numbers, int64_t max_slots) {
    slot_bytes_ = slot_numbers * 2;
    max_slots_ = max_slots;
    return region_.Map(slot_bytes_ * size_t(max_slots), "dense window");
  }
  // The lowest free slot, so that memory stays compact.
  int32_t Allocate() {
    int32_t slot;
    if (free_.empty()) {
      if (end_ >= max_slots_) return -1;
      slot = int32_t(end_++);
    } else {
      std::pop_heap(free_.begin(), free_.end(), std::greater<>());
      slot = free_.back();
      free_.pop_back();
    }
    region_.Touch(size_t(slot) * slot_bytes_, slot_bytes_);
    ++used_;
    high_ = std::max(high_, end_);
    return slot;
  }
  void Free(int32_t slot) {
    free_.push_back(slot);
    std::push_heap(free_.begin(), free_.end(), std::greater<>());
    --used_;
  }
  // Gives back the pages of free slots, but for one that the next token is likely to take.
  void Trim() {
    std::sort(free_.begin(), free_.end());  // ascending order is a heap for std::greater
    while (!free_.empty() && free_.back() == end_ - 1) {
      free_.pop_back();
      --end_;
    }
    for (size_t i = free_.empty() ? 0 : 1; i < free_.size();) {
      size_t run = i + 1;
      while (run < free_.size() && free_[run] == free_[run - 1] + 1) ++run;
      region_.Release(size_t(free_[i]) * slot_bytes_, (run - i) * slot_bytes_);
      i = run;
    }
    if (end_ < high_)
      region_.Release(size_t(end_) * slot_bytes_, size_t(high_ - end_) * slot_bytes_ + 4095);
    high_ = end_;
  }
  void Clear() {
    free_.clear();
    end_ = used_ = high_ = 0;
    region_.Release(0, region_.size() + 4096);
  }
  uint16_t* numbers(int32_t slot) const {
    return reinterpret_cast<uint16_t*>(region_.data() + size_t(slot) * slot_bytes_);
  }
  int64_t used() const { return used_; }
  size_t committed() const { return region_.committed(); }
  size_t bookkeeping() const { return region_.bookkeeping(); }

 private:
  Reserve region_;
  size_t slot_bytes_ = 0;
  int64_t max_slots_ = 0, used_ = 0;
  int64_t end_ = 0, high_ = 0;  // slots behind end_ are free; those behind high_ are not committed
  std::vector<int32_t> free_;
};

}  // namespace sparkv

// Rows of one stage that are not packed. A slot holds a token in all layers; slots lie in groups
// that keep the rows of a layer together, so that a reader finds them in a few runs of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/reserve.h"

namespace sparkv {

// Slots of a group: as many as sinks by default, so that sinks and window fill whole groups. A
// store of many rows has longer ones, since a reader of one head finds its rows group by group:
// they take 0.9 of the time of a decode step, and leave up to 15 slots unused instead of 3.
inline constexpr int64_t kGroupSlots = 4, kLongGroupSlots = 16, kManyRows = 128;

class DenseStore {
 public:
  // rows: how many it mostly holds.
  Status Map(size_t slot_bytes, int64_t max_slots, int64_t rows) {
    group_slots_ = int32_t(rows >= kManyRows ? kLongGroupSlots : kGroupSlots);
    group_bytes_ = slot_bytes * size_t(group_slots_);
    max_slots_ = max_slots;
    const int64_t n_groups = (max_slots + group_slots_ - 1) / group_slots_;
    in_use_.assign(size_t(n_groups), 0);
    return region_.Map(group_bytes_ * size_t(n_groups), "dense window");
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
    const size_t group = size_t(slot / group_slots_);
    if (in_use_[group]++ == 0) {
      region_.Touch(group * group_bytes_, group_bytes_);
      ++n_groups_;
    }
    ++used_;
    high_ = std::max(high_, end_);
    return slot;
  }
  void Free(int32_t slot) {
    free_.push_back(slot);
    std::push_heap(free_.begin(), free_.end(), std::greater<>());
    if (--in_use_[size_t(slot / group_slots_)] == 0) --n_groups_;
    --used_;
  }
  // Slots in use; without holes they would be the first ones.
  int64_t used() const { return used_; }
  int32_t lowest_free() const { return free_.empty() ? int32_t(end_) : free_.front(); }
  // Whether its rows would fit into fewer groups.
  bool sparse() const { return n_groups_ * group_slots_ - used_ >= group_slots_; }
  // Gives back the pages of empty groups; keep_next: but for the one that the next token takes, if
  // others in use follow it, so that decoding does not give back and take the same pages in turns.
  void Trim(bool keep_next) {
    std::sort(free_.begin(), free_.end());  // ascending order is a heap for std::greater
    while (!free_.empty() && free_.back() == end_ - 1) {
      free_.pop_back();
      --end_;
    }
    const int64_t next = !keep_next || free_.empty() ? -1 : free_.front() / group_slots_;
    const size_t touched = size_t((high_ + group_slots_ - 1) / group_slots_);
    for (size_t first = 0; first < touched;) {
      size_t last = first;
      while (last < touched && in_use_[last] == 0 && int64_t(last) != next) ++last;
      region_.Release(first * group_bytes_,
                      (last - first) * group_bytes_ + (last == touched ? 4095 : 0));
      first = last + 1;
    }
    high_ = end_;
  }
  void Clear() {
    in_use_.assign(in_use_.size(), 0);
    free_.clear();
    end_ = used_ = high_ = n_groups_ = 0;
    region_.Release(0, region_.size() + 4096);
  }
  // What the slots of the group hold of a layer, whose rows begin at byte `layer_at` of a slot.
  uint8_t* rows(int32_t slot, size_t layer_at) const {
    return region_.data() + size_t(slot / group_slots_) * group_bytes_ +
           layer_at * size_t(group_slots_);
  }
  int32_t group_slots() const { return group_slots_; }
  size_t committed() const { return region_.committed(); }
  size_t bookkeeping() const { return in_use_.size() + region_.bookkeeping(); }

 private:
  Reserve region_;
  int32_t group_slots_ = 1;
  size_t group_bytes_ = 0;
  int64_t max_slots_ = 0, used_ = 0, n_groups_ = 0;
  int64_t end_ = 0, high_ = 0;  // slots behind end_ are free; groups behind high_ are not committed
  std::vector<uint8_t> in_use_;  // slots per group
  std::vector<int32_t> free_;
};

}  // namespace sparkv

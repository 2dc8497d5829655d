// Address space without memory: pages are committed by the first write and can be given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/status.h"

namespace sparkv {

// A region of bytes that starts as zeros and costs nothing until touched. The region counts its own
// committed pages: every writer calls Touch first, so committed() is what the kernel holds
// (transparent huge pages are switched off for the region).
class Reserve {
 public:
  Reserve() = default;
  ~Reserve();
  Reserve(const Reserve&) = delete;
  Reserve& operator=(const Reserve&) = delete;

  // `what` names the region in errors. Readers may overrun the end by up to 128 bytes.
  Status Map(size_t bytes, const char* what);
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  size_t committed() const { return committed_; }
  size_t bookkeeping() const { return page_touched_.size() / 8; }

  void Touch(size_t offset, size_t bytes);
  // Gives back the pages that lie wholly inside the range.
  void Release(size_t offset, size_t bytes);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;
  size_t committed_ = 0;
  std::vector<bool> page_touched_;
};

}  // namespace sparkv

#include "base/reserve.h"

#include <sys/mman.h>

namespace sparkv {
namespace {
constexpr size_t kPage = 4096;
constexpr size_t kOverrun = 128;
}  // namespace

Reserve::~Reserve() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

Status Reserve::Map(size_t bytes, const char* what) {
  const size_t mapped = (bytes + kOverrun + kPage - 1) / kPage * kPage;
  const std::string text =
      std::string(what) + ": cannot reserve " + std::to_string(bytes) + " bytes of address space";
  if (mapped < bytes) return Status::NoMemory(text);
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return Status::NoMemory(text);
  madvise(p, mapped, MADV_NOHUGEPAGE);
  try {
    page_touched_.assign(mapped / kPage, false);
  } catch (...) {
    munmap(p, mapped);
    return Status::NoMemory(text);
  }
  data_ = static_cast<uint8_t*>(p);
  size_ = bytes;
  mapped_ = mapped;
  committed_ = 0;
  return Status::Ok();
}

void Reserve::Touch(size_t offset, size_t bytes) {
  if (bytes == 0) return;
  for (size_t page = offset / kPage; page <= (offset + bytes - 1) / kPage; ++page) {
    if (!page_touched_[page]) {
      page_touched_[page] = true;
      committed_ += kPage;
    }
  }
}

void Reserve::Release(size_t offset, size_t bytes) {
  const size_t first = (offset + kPage - 1) / kPage;
  const size_t last = (offset + bytes) / kPage;  // exclusive
  for (size_t page = first; page < last;) {
    if (!page_touched_[page]) {
      ++page;
      continue;
    }
    size_t end = page;
    while (end < last && page_touched_[end]) page_touched_[end++] = false;
    madvise(data_ + page * kPage, (end - page) * kPage, MADV_DONTNEED);
    committed_ -= (end - page) * kPage;
    page = end;
  }
}

}  // namespace sparkv

// Checksum of files of ours: FNV-1a, 64 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparkv {

static inline uint64_t Fnv1a(const void* bytes, size_t n, uint64_t hash = 0xcbf29ce484222325u) {
  const uint8_t* p = static_cast<const uint8_t*>(bytes);
  for (size_t i = 0; i < n; ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}

}  // namespace sparkv

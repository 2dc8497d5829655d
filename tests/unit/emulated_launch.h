// How step-inl.h starts kernels on the emulator.
#pragma once

#include "base/status.h"
#include "gpu_emulator.h"

namespace sparkv::gpu {

template <typename Kernel, typename... Args>
Status Launch(Kernel* kernel, dim3 grid, int n_threads, size_t shared_bytes, void*,
              const Args&... args) {
  Block::Launch(grid, unsigned(n_threads), shared_bytes, [&] { kernel(args...); });
  return Status::Ok();
}

}  // namespace sparkv::gpu

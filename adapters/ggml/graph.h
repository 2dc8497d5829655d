// Which ops the device claims, and their execution on the cache.
#pragma once

#include "ggml-backend-impl.h"

namespace sparkv {

// True for every op that touches a KV tensor of this device, also for those that it cannot do:
// another device would read packed bytes as f16. What it cannot do is refused when the host plans
// its graphs, before anything is computed.
bool SupportsOp(const ggml_tensor* op);

ggml_status Compute(ggml_backend_t backend, ggml_cgraph* graph);

// True once the host asked for any op.
bool WasPlanned();

}  // namespace sparkv

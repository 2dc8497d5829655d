// Rotary position embedding as ggml's GGML_OP_ROPE computes it, for keys that move (context shift).
#pragma once

#include "sparkv/sparkv.h"

namespace sparkv {

// Rotates k [head_dim] of one head by `delta` positions.
void RotatePosition(const sparkv_rope& rope, int delta, float* k);

}  // namespace sparkv

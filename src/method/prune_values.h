// Value pruning as the reference has it (docs/method.md, section 6). A baseline: packed rows
// quantise values instead.
#pragma once

#include <cstdint>

#include "sparkv/sparkv.h"

namespace sparkv {

// v, mask, out: [n_tokens][head_dim] of one head. Keeps the head_dim - int(ratio * head_dim) best
// channels of each token. Pruned entries become the signed mean of the token's pruned entries
// (mean) or 0 (zero).
void PruneValues(const float* v, int n_tokens, int head_dim, double ratio, sparkv_recover how,
                 uint8_t* mask, float* out);

// One cut for the whole head: the fewest entries whose scores sum to more than top_p of the total;
// top_p = 1 keeps all.
void PruneValuesTopP(const float* v, int n_tokens, int head_dim, double top_p, sparkv_recover how,
                     uint8_t* mask, float* out);

}  // namespace sparkv

// ThinK (arXiv 2407.21018), the structured baseline: one set of channels for all tokens of a head
// (docs/method.md, section 10).
#pragma once

#include <cstdint>

namespace sparkv {

// mask[j] = 1 for the head_dim - int(ratio * head_dim) channels with the largest mean q^2 * mean
// k^2. Ties: the smaller channel wins. q: [group][n_queries][head_dim]; k: [n_tokens][head_dim];
// mask: [head_dim]
void ThinkMask(const float* q, int group, int n_queries, const float* k, int n_tokens, int head_dim,
               double ratio, uint8_t* mask);

}  // namespace sparkv

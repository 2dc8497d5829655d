// Rows as codecs of others would give them back, for comparison in one harness: coded and decoded,
// in place. What is not finite counts as 0. Each codec is in a file of its own.
#pragma once

#include <cstdint>

#include "config/baseline_name.h"

namespace sparkv {

// Consecutive tokens whose keys are coded together.
int KeyBlock(const Baseline& baseline);
// Its channels are chosen once per sequence and head (ThinK).
bool NeedsChannels(const Baseline& baseline);

// k: [n_tokens][head_dim], n_tokens <= KeyBlock; channels: [head_dim] where they are needed, or
// NULL.
void CodeKeys(const Baseline& baseline, const uint16_t* channels, int n_tokens, int head_dim,
              float* k);
void CodeValue(const Baseline& baseline, int head_dim, float* v);  // v: [head_dim]

// Bits per element of a coded row, all it needs included but the channels, a bit each.
double KeyBits(const Baseline& baseline, int head_dim);
double ValueBits(const Baseline& baseline, int head_dim);

}  // namespace sparkv

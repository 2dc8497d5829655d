// Codecs that leave numbers out and keep the others as f16.
#pragma once

#include <cstdint>

namespace sparkv {

// Mustafar (arXiv 2505.22913): of each token's key and value the head_dim - int(ratio * head_dim)
// entries of largest magnitude are kept, and a bit per channel says which. The paper's tiles of 64
// also hold offsets and padding, which are not counted.
void MustafarRow(double ratio, int head_dim, float* x);  // x: [head_dim], in place
double MustafarBits(double ratio, int head_dim);         // per element

// ThinK (arXiv 2407.21018, section 3): the same channels of all keys of a head are kept, those with
// the largest |q_j| |k_j| over tokens (method/think.h). channels: [head_dim], 0: pruned.
void ThinkKey(const uint16_t* channels, int head_dim, float* k);  // k: [head_dim], in place
// Per element of a key; the set takes a bit per channel more, once per sequence and head.
double ThinkKeyBits(double ratio, int head_dim);

}  // namespace sparkv

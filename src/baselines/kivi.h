// KIVI (arXiv 2402.02750): asymmetric integers of `bits` bits in groups of 32, keys along tokens,
// values along channels. With z = min and s = (max - min) / (2^bits - 1) of a group, both f16:
//   code = round((x - z) / s),  x' = code * s + z.
// From the paper; its residual window is the cache's own.
#pragma once

namespace sparkv {

inline constexpr int kKiviGroup = 32;

// All in place. k: [n_tokens][head_dim], one group per channel, n_tokens <= kKiviGroup.
void KiviKeys(int bits, int n_tokens, int head_dim, float* k);
// v: [head_dim]; the last group is shorter where 32 does not divide head_dim.
void KiviValue(int bits, int head_dim, float* v);

// Per element, with the two f16 of a group.
double KiviKeyBits(int bits);
double KiviValueBits(int bits, int head_dim);

}  // namespace sparkv

// Rows as llama.cpp stores them with -ctk and -ctv: rotated by a Hadamard matrix where 64 divides
// the head size, then in blocks of 32 numbers with an f16 scale d (ggml-quants.c, *_ref). Codes:
//   q8_0  d = max|x| / 127             round(x / d)         x' = code d
//   q4_0  d = (x of max|x|) / -8       floor(x / d + 8.5)   x' = (code - 8) d
//   q5_1  d = (max - min) / 31, m = min, f16   floor((x - m) / d + .5)   x' = code d + m
#pragma once

#include "config/baseline_name.h"

namespace sparkv {

// x: [head_dim], in place; codec: kQ8_0, kQ5_1 or kQ4_0. llama.cpp rotates keys in blocks of the
// largest power of two that divides head_dim, values in blocks of 64. Its blocks of 32 may hold
// parts of two heads where 32 does not divide head_dim; here the last block of a head is shorter.
void GgmlRow(Codec codec, bool key, int head_dim, float* x);
// Per element, with the scales.
double GgmlRowBits(Codec codec, int head_dim);

}  // namespace sparkv

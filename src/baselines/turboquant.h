// TurboQuant (arXiv 2504.19874, algorithm 1, the variant for mean squared error; keys and values).
// x / |x| is rotated at random, so that its coordinates are about normal with deviation
// 1 / sqrt(head_dim), and each is coded by the Lloyd-Max quantiser of that distribution:
//   x' = R^T (level[code] * |x| / sqrt(head_dim)),  |x| as f16.
// The rotation is a Hadamard matrix behind seeded signs, the same for all rows: nothing is stored
// for it. The paper's is a dense random one.
#pragma once

namespace sparkv {

// x: [head_dim], in place; bits: 2, 3 or 4. Blocks of the rotation are powers of two.
void TurboQuant(int bits, int head_dim, float* x);
// Per element, with the norm.
double TurboQuantBits(int bits, int head_dim);

}  // namespace sparkv

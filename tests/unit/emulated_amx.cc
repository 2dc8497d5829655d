// The kernels for AMX as a machine that has AVX-512 with bf16 can run them.
#define SPARKV_EMULATED_AMX
#define avx512 avx512_beside_emulated_amx
#define amx emulated_amx
#include "../../src/ops/cpu/attend_avx512.cc"

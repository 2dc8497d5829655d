#include <immintrin.h>

#include "ops/cpu/inl.h"

namespace sparkv::avx2 {
#include "ops/cpu/row-inl.h"
#include "ops/cpu/trellis-inl.h"

#include "ops/cpu/pack-inl.h"
}  // namespace sparkv::avx2

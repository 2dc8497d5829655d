#include "baselines/ggml_rows.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "format/row_layout.h"
#include "ops/hadamard.h"

namespace sparkv {
namespace {

constexpr int kBlock = 32;

// Codes are made with the scale before it is rounded to f16, as ggml does.
void CodeBlock(Codec codec, int n, float* x) {
  const auto [low, high] = std::minmax_element(x, x + n);
  const float min = *low, max = *high;
  const float largest =
      *std::max_element(x, x + n, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  const float d = codec == Codec::kQ8_0   ? std::fabs(largest) / 127.0f
                  : codec == Codec::kQ4_0 ? largest / -8.0f
                                          : (max - min) / 31.0f;
  const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
  const float scale = HalfToFloat(FloatToHalf(d)), offset = HalfToFloat(FloatToHalf(min));
  for (int j = 0; j < n; ++j) {
    if (codec == Codec::kQ8_0) {
      x[j] = std::round(x[j] * inverse) * scale;
    } else if (codec == Codec::kQ4_0) {
      x[j] = (std::min(std::floor(x[j] * inverse + 8.5f), 15.0f) - 8.0f) * scale;
    } else {
      x[j] = std::floor((x[j] - min) * inverse + 0.5f) * scale + offset;
    }
  }
}

}  // namespace

void GgmlRow(Codec codec, bool key, int head_dim, float* x) {
  const int rotation = head_dim % 64 != 0 ? 1 : key ? RotationBlock(head_dim) : 64;
  Rotate(x, head_dim, rotation);
  for (int j = 0; j < head_dim; j += kBlock)
    CodeBlock(codec, std::min(kBlock, head_dim - j), x + j);
  Rotate(x, head_dim, rotation);
}

double GgmlRowBits(Codec codec, int head_dim) {
  const double block_bits = codec == Codec::kQ5_1 ? 32.0 : 16.0;
  const double code_bits = codec == Codec::kQ8_0 ? 8.0 : codec == Codec::kQ5_1 ? 5.0 : 4.0;
  return code_bits + block_bits * ((head_dim + kBlock - 1) / kBlock) / head_dim;
}

}  // namespace sparkv

#include "baselines/turboquant.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "base/half.h"
#include "format/row_layout.h"
#include "ops/hadamard.h"

namespace sparkv {
namespace {

// The positive half of the Lloyd-Max levels of the unit normal distribution.
constexpr float kTwoBits[] = {0.4527800f, 1.5104176f};
constexpr float kThreeBits[] = {0.2450942f, 0.7560053f, 1.3439093f, 2.1519457f};
constexpr float kFourBits[] = {0.1283950f, 0.3880483f, 0.6567591f, 0.9423405f,
                               1.2562312f, 1.6180464f, 2.0690172f, 2.7325896f};

float Nearest(std::span<const float> levels, float x) {
  size_t i = 0;
  while (i + 1 < levels.size() && std::fabs(x) > 0.5f * (levels[i] + levels[i + 1])) ++i;
  return std::copysign(levels[i], x);
}

void FlipSigns(int n, float* x) {
  uint64_t state = 0x5eed;
  for (int j = 0; j < n; ++j) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    if (state >> 63 != 0) x[j] = -x[j];
  }
}

}  // namespace

void TurboQuant(int bits, int head_dim, float* x) {
  const std::span<const float> levels = bits == 2   ? std::span<const float>(kTwoBits)
                                        : bits == 3 ? std::span<const float>(kThreeBits)
                                                    : std::span<const float>(kFourBits);
  double square = 0.0;
  for (int j = 0; j < head_dim; ++j) square += double(x[j]) * double(x[j]);
  const float norm = HalfToFloat(FloatToHalf(std::min(float(std::sqrt(square)), 65504.0f)));
  const float deviation = norm / std::sqrt(float(head_dim));
  FlipSigns(head_dim, x);
  Rotate(x, head_dim, RotationBlock(head_dim));
  for (int j = 0; j < head_dim; ++j)
    x[j] = deviation > 0.0f ? Nearest(levels, x[j] / deviation) * deviation : 0.0f;
  Rotate(x, head_dim, RotationBlock(head_dim));
  FlipSigns(head_dim, x);
}

double TurboQuantBits(int bits, int head_dim) { return bits + 16.0 / head_dim; }

}  // namespace sparkv

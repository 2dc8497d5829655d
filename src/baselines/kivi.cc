#include "baselines/kivi.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"

namespace sparkv {
namespace {

// x: n numbers, `stride` apart.
void CodeGroup(int bits, int n, int stride, float* x) {
  float low = x[0], high = x[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, x[i * stride]);
    high = std::max(high, x[i * stride]);
  }
  const float top = float((1 << bits) - 1);
  const float zero = HalfToFloat(FloatToHalf(low));
  const float scale = HalfToFloat(FloatToHalf((high - low) / top));
  for (int i = 0; i < n; ++i) {
    const float code = scale > 0.0f ? std::nearbyint((x[i * stride] - zero) / scale) : 0.0f;
    x[i * stride] = std::clamp(code, 0.0f, top) * scale + zero;
  }
}

}  // namespace

void KiviKeys(int bits, int n_tokens, int head_dim, float* k) {
  for (int j = 0; j < head_dim; ++j) CodeGroup(bits, n_tokens, head_dim, k + j);
}

void KiviValue(int bits, int head_dim, float* v) {
  for (int j = 0; j < head_dim; j += kKiviGroup)
    CodeGroup(bits, std::min(kKiviGroup, head_dim - j), 1, v + j);
}

double KiviKeyBits(int bits) { return bits + 32.0 / kKiviGroup; }

double KiviValueBits(int bits, int head_dim) {
  return bits + 32.0 * ((head_dim + kKiviGroup - 1) / kKiviGroup) / head_dim;
}

}  // namespace sparkv

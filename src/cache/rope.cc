#include "cache/rope.h"

#include <algorithm>
#include <cmath>

namespace sparkv {
namespace {

// YaRN (arXiv 2309.00071): dimensions that turn more than beta_fast times over the original context
// keep their frequency, those that turn less than beta_slow times are interpolated, the ones
// between are mixed.
float CorrectionDim(const sparkv_rope& rope, float beta) {
  const float pi = 3.14159265358979f;
  return float(rope.n_rot) * std::log(float(rope.n_ctx_orig) / (beta * 2.0f * pi)) /
         (2.0f * std::log(rope.freq_base));
}

}  // namespace

void RotatePosition(const sparkv_rope& rope, int delta, float* k) {
  k += rope.first_channel;
  const int half = rope.n_rot / 2;
  const float theta_scale = std::pow(rope.freq_base, -2.0f / float(rope.n_rot));
  float low = 0.0f, high = 0.0f;
  if (rope.ext_factor != 0.0f) {
    low = std::max(0.0f, std::floor(CorrectionDim(rope, rope.beta_fast)));
    high = std::min(float(rope.n_rot - 1), std::ceil(CorrectionDim(rope, rope.beta_slow)));
  }
  float position = float(delta);
  for (int i = 0; i < half; ++i, position *= theta_scale) {
    const float extrapolated =
        position / (rope.freq_factors != nullptr ? rope.freq_factors[i] : 1.0f);
    float theta = rope.freq_scale * extrapolated, magnitude = rope.attn_factor;
    if (rope.ext_factor != 0.0f) {
      const float y = (float(i) - low) / std::max(0.001f, high - low);
      const float mix = (1.0f - std::min(1.0f, std::max(0.0f, y))) * rope.ext_factor;
      theta = theta * (1.0f - mix) + extrapolated * mix;
      magnitude *= 1.0f + 0.1f * std::log(1.0f / rope.freq_scale);
    }
    const float c = std::cos(theta) * magnitude, s = std::sin(theta) * magnitude;
    float& x = rope.neox != 0 ? k[i] : k[2 * i];
    float& y = rope.neox != 0 ? k[i + half] : k[2 * i + 1];
    const float x0 = x, y0 = y;
    x = x0 * c - y0 * s;
    y = x0 * s + y0 * c;
  }
}

}  // namespace sparkv

#include "method/saliency.h"

#include <cmath>

#include "method/select.h"

namespace sparkv {

bool NoWeights(const float* u, int head_dim) {
  for (int j = 0; j < head_dim; ++j) {
    if (u[j] > 0.0f && std::isfinite(u[j])) return false;
  }
  return true;
}

void Contribution(const float* k, const float* u, int head_dim, float* s) {
  const bool no_weights = NoWeights(u, head_dim);
  for (int j = 0; j < head_dim; ++j) s[j] = k[j] * k[j] * (no_weights ? 1.0f : u[j]);
}

void SelectBytes(const float* score, int n, int kept, uint8_t* mask) {
  uint64_t bits[kMaxSelect / 64];
  SelectTop(score, n, kept, bits);
  for (int j = 0; j < n; ++j) mask[j] = uint8_t(bits[j / 64] >> (j % 64) & 1);
}

void SelectChannels(const float* k, const float* u, int head_dim, int kept, uint8_t* mask) {
  float s[kMaxSelect];
  Contribution(k, u, head_dim, s);
  SelectBytes(s, head_dim, kept, mask);
}

}  // namespace sparkv

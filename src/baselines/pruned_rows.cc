#include "baselines/pruned_rows.h"

#include <cmath>
#include <vector>

#include "config/config.h"
#include "method/saliency.h"

namespace sparkv {

void MustafarRow(double ratio, int head_dim, float* x) {
  const size_t dim = size_t(head_dim);
  std::vector<float> magnitude(dim);
  std::vector<uint8_t> mask(dim);
  for (size_t j = 0; j < dim; ++j) magnitude[j] = std::fabs(x[j]);
  SelectBytes(magnitude.data(), head_dim, KeptChannels(ratio, head_dim), mask.data());
  for (size_t j = 0; j < dim; ++j) x[j] = mask[j] != 0 ? x[j] : 0.0f;
}

double MustafarBits(double ratio, int head_dim) {
  return 1.0 + 16.0 * KeptChannels(ratio, head_dim) / head_dim;
}

void ThinkKey(const uint16_t* channels, int head_dim, float* k) {
  for (int j = 0; j < head_dim; ++j) k[j] = channels[j] != 0 ? k[j] : 0.0f;
}

double ThinkKeyBits(double ratio, int head_dim) {
  return 16.0 * KeptChannels(ratio, head_dim) / head_dim;
}

}  // namespace sparkv

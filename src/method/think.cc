#include "method/think.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "config/config.h"
#include "method/saliency.h"

namespace sparkv {
namespace {

// Mean over rows of x[row][j]^2; what is not finite is left out, so one bad token does not decide
// for the others. x: [n_rows][head_dim]
std::vector<double> MeanSquare(const float* x, size_t n_rows, size_t head_dim) {
  std::vector<double> mean(head_dim, 0.0);
  for (size_t j = 0; j < head_dim; ++j) {
    double sum = 0.0;
    size_t n = 0;
    for (size_t row = 0; row < n_rows; ++row) {
      const double value = x[row * head_dim + j];
      if (!std::isfinite(value)) continue;
      sum += value * value;
      ++n;
    }
    mean[j] = sum / double(std::max<size_t>(1, n));
  }
  return mean;
}

}  // namespace

void ThinkMask(const float* q, int group, int n_queries, const float* k, int n_tokens, int head_dim,
               double ratio, uint8_t* mask) {
  const size_t dim = size_t(head_dim);
  const std::vector<double> of_q = MeanSquare(q, size_t(group) * size_t(n_queries), dim);
  const std::vector<double> of_k = MeanSquare(k, size_t(n_tokens), dim);
  std::vector<float> score(dim);
  for (size_t j = 0; j < dim; ++j) score[j] = float(of_q[j] * of_k[j]);
  SelectBytes(score.data(), head_dim, KeptChannels(ratio, head_dim), mask);
}

}  // namespace sparkv

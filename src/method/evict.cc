#include "method/evict.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sparkv {

void AddAttention(float* logits, int64_t n_logits, int64_t n, float* score) {
  const float nothing = -std::numeric_limits<float>::infinity();
  const float most = *std::max_element(logits, logits + n_logits);
  if (!(most > nothing)) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < n_logits; ++i) {
    logits[i] = std::exp(logits[i] - most);
    sum += logits[i];
  }
  for (int64_t i = 0; i < n; ++i) score[i] += logits[i] / sum;
}

QueryMoments MomentsOf(const float* queries, size_t n, size_t stride, size_t head_dim) {
  QueryMoments q;
  q.mean.assign(head_dim, 0.0f);
  q.variance.assign(head_dim, 0.0f);
  const float each = 1.0f / float(n);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < head_dim; ++j) q.mean[j] += queries[i * stride + j] * each;
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < head_dim; ++j) {
      const float off = queries[i * stride + j] - q.mean[j];
      q.variance[j] += off * off * each;
    }
  }
  return q;
}

float ExpectedLogit(const QueryMoments& q, const float* k) {
  float sum = 0.0f;
  for (size_t j = 0; j < q.mean.size(); ++j)
    sum += k[j] * (q.mean[j] + 0.5f * q.variance[j] * k[j]);
  return sum;
}

void PoolScores(std::vector<float>* score, int width) {
  const int64_t n = int64_t(score->size()), half = width / 2;
  std::vector<float> pooled(score->size());
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t j = std::max<int64_t>(0, i - half); j <= std::min(n - 1, i + half); ++j)
      sum += (*score)[size_t(j)];
    pooled[size_t(i)] = sum / float(width);
  }
  *score = std::move(pooled);
}

std::vector<uint8_t> SelectRows(const std::vector<float>& score, int64_t keep) {
  std::vector<int64_t> order(score.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto value = [&](int64_t i) {
    const float s = score[size_t(i)];
    return std::isnan(s) ? -std::numeric_limits<float>::infinity() : s;
  };
  keep = std::min(keep, int64_t(score.size()));
  std::nth_element(order.begin(), order.begin() + keep, order.end(), [&](int64_t a, int64_t b) {
    return value(a) != value(b) ? value(a) > value(b) : a > b;
  });
  std::vector<uint8_t> kept(score.size(), 0);
  for (int64_t i = 0; i < keep; ++i) kept[size_t(order[size_t(i)])] = 1;
  return kept;
}

std::vector<int64_t> LayerRows(int32_t evict, int64_t keep, int64_t n, int n_layers) {
  std::vector<int64_t> rows(size_t(n_layers), std::min(keep, n));
  if (evict != SPARKV_EVICT_PYRAMIDKV || n_layers < 2 || keep >= n) return rows;
  constexpr double kSteepness = 20.0;  // beta of the paper's code
  const double least = double(keep) / kSteepness, most = 2.0 * double(keep) - least;
  int64_t left = keep * n_layers;
  std::fill(rows.begin(), rows.end(), 0);
  // Lower layers first: each takes its share of what is left among the layers that follow.
  double weights = double(keep) * n_layers;
  for (int l = 0; l < n_layers; ++l) {
    const double weight = most - (most - least) * l / (n_layers - 1);
    const double share = l + 1 == n_layers ? double(left) : double(left) * weight / weights;
    rows[size_t(l)] = std::min(n, int64_t(std::llround(share)));
    left -= rows[size_t(l)];
    weights -= weight;
  }
  return rows;
}

}  // namespace sparkv

#include "method/prune_values.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "config/config.h"
#include "method/saliency.h"
#include "method/select.h"

namespace sparkv {
namespace {

// Sample variance of the finite numbers; 0 for fewer than two, where the reference has NaN.
class Variance {
 public:
  void Add(double x) {
    if (!std::isfinite(x)) return;
    n_ += 1.0;
    const double delta = x - mean_;
    mean_ += delta / n_;
    squares_ += delta * (x - mean_);
  }
  double Get() const { return n_ < 2.0 ? 0.0 : squares_ / (n_ - 1.0); }

 private:
  double n_ = 0.0;
  double mean_ = 0.0, squares_ = 0.0;
};

// 0.7 |v| + 0.3 d / max d with d = (variance of the channel + variance of the token) / 2. Entries
// that are not finite keep out of the variances, so they rank first in their own token and change
// no other.
std::vector<float> ValueScores(const float* v, size_t n_tokens, size_t head_dim) {
  std::vector<Variance> of_channel(head_dim), of_token(n_tokens);
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t j = 0; j < head_dim; ++j) {
      of_channel[j].Add(v[t * head_dim + j]);
      of_token[t].Add(v[t * head_dim + j]);
    }
  }
  const auto diversity = [&](size_t t, size_t j) {
    return (of_channel[j].Get() + of_token[t].Get()) / 2;
  };
  double largest = 0.0;
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t j = 0; j < head_dim; ++j) largest = std::max(largest, diversity(t, j));
  }
  std::vector<float> score(n_tokens * head_dim);
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t j = 0; j < head_dim; ++j) {
      const size_t i = t * head_dim + j;
      score[i] = float(0.7 * std::fabs(double(v[i])) + 0.3 * diversity(t, j) / (largest + 1e-8));
    }
  }
  return score;
}

void Fill(const float* v, const uint8_t* mask, size_t n_tokens, size_t head_dim, sparkv_recover how,
          float* out) {
  for (size_t t = 0; t < n_tokens; ++t, v += head_dim, mask += head_dim, out += head_dim) {
    double sum = 0.0;
    int count = 0;
    for (size_t j = 0; j < head_dim; ++j) {
      if (mask[j] != 0) continue;
      sum += v[j];
      ++count;
    }
    const float fill = how == SPARKV_RECOVER_MEAN ? float(sum / std::max(1, count)) : 0.0f;
    for (size_t j = 0; j < head_dim; ++j) out[j] = mask[j] != 0 ? v[j] : fill;
  }
}

}  // namespace

void PruneValues(const float* v, int n_tokens, int head_dim, double ratio, sparkv_recover how,
                 uint8_t* mask, float* out) {
  const size_t tokens = size_t(n_tokens), dim = size_t(head_dim);
  const std::vector<float> score = ValueScores(v, tokens, dim);
  const int kept = KeptChannels(ratio, head_dim);
  for (size_t t = 0; t < tokens; ++t) SelectBytes(&score[t * dim], head_dim, kept, &mask[t * dim]);
  Fill(v, mask, tokens, dim, how, out);
}

void PruneValuesTopP(const float* v, int n_tokens, int head_dim, double top_p, sparkv_recover how,
                     uint8_t* mask, float* out) {
  const size_t tokens = size_t(n_tokens), dim = size_t(head_dim);
  const std::vector<float> score = ValueScores(v, tokens, dim);
  std::vector<size_t> order(score.size());
  double total = 0.0;
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    if (std::isfinite(score[i])) total += score[i];
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const int32_t key_a = select_internal::RankKey(score[a]),
                  key_b = select_internal::RankKey(score[b]);
    return key_a != key_b ? key_a > key_b : a < b;
  });
  size_t n_kept = order.size();
  double cumulative = 0.0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (std::isfinite(score[order[i]])) cumulative += score[order[i]];
    if (cumulative > top_p * total) {
      n_kept = i + 1;
      break;
    }
  }
  std::fill(mask, mask + order.size(), uint8_t{0});
  for (size_t i = 0; i < n_kept; ++i) mask[order[i]] = 1;
  Fill(v, mask, tokens, dim, how, out);
}

}  // namespace sparkv

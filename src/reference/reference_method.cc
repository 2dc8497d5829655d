#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "reference/reference.h"

namespace sparkv::reference {
namespace {

int Kept(double ratio, int head_dim) { return head_dim - int(ratio * head_dim); }

double Sign(float x) { return x > 0.0f ? 1.0 : -1.0; }

// The `kept`-th largest, NaN being largest.
double Threshold(const Row& s, int kept) { return s[size_t(Order(s)[size_t(kept) - 1])]; }

// Sample variance of the finite numbers, 0 for fewer than two.
double Variance(const Row& x) {
  double sum = 0.0, n = 0.0;
  for (double value : x) {
    if (std::isfinite(value)) sum += value, n += 1.0;
  }
  if (n < 2.0) return 0.0;
  double squares = 0.0;
  for (double value : x) {
    if (std::isfinite(value)) squares += (value - sum / n) * (value - sum / n);
  }
  return squares / (n - 1.0);
}

// 0.7 |v| + 0.3 d / (max d + 1e-8), d = (variance over tokens + variance over channels) / 2
Row ValueScores(const float* v, int n_tokens, int head_dim) {
  Row of_channel, of_token;
  for (int j = 0; j < head_dim; ++j) {
    Row column;
    for (int t = 0; t < n_tokens; ++t) column.push_back(v[t * head_dim + j]);
    of_channel.push_back(Variance(column));
  }
  for (int t = 0; t < n_tokens; ++t) {
    of_token.push_back(Variance(Row(v + t * head_dim, v + (t + 1) * head_dim)));
  }
  Row d;
  for (double token : of_token) {
    for (double channel : of_channel) d.push_back((channel + token) / 2.0);
  }
  const double largest = d.empty() ? 0.0 : *std::max_element(d.begin(), d.end());
  Row score;
  for (size_t i = 0; i < d.size(); ++i) {
    score.push_back(0.7 * std::fabs(v[i]) + 0.3 * d[i] / (largest + 1e-8));
  }
  return score;
}

Row FillValues(const float* v, const Mask& mask, int head_dim, sparkv_recover how) {
  Row out;
  for (size_t first = 0; first < mask.size(); first += size_t(head_dim)) {
    double sum = 0.0, n = 0.0;
    for (size_t i = first; i < first + size_t(head_dim); ++i) {
      if (mask[i] == 0) sum += v[i], n += 1.0;
    }
    for (size_t i = first; i < first + size_t(head_dim); ++i) {
      out.push_back(mask[i] != 0 ? v[i] : how == SPARKV_RECOVER_MEAN ? sum / n : 0.0);
    }
  }
  return out;
}

}  // namespace

Row ChannelWeight(const float* q, int group, int n_queries, int head_dim, sparkv_group how) {
  Row u;
  for (int j = 0; j < head_dim; ++j) {
    double energy = 0.0;
    for (int w = 0; w < n_queries; ++w) {
      double sum = 0.0, squares = 0.0;
      for (int g = 0; g < group; ++g) {
        const double x =
            q[(size_t(g) * size_t(n_queries) + size_t(w)) * size_t(head_dim) + size_t(j)];
        sum += x;
        squares += x * x;
      }
      energy += how == SPARKV_GROUP_SIGNED ? (sum / group) * (sum / group) : squares / group;
    }
    u.push_back(std::sqrt(energy));
  }
  return u;
}

Row Contribution(const float* k, const Row& u) {
  bool no_weights = true;
  for (double weight : u) no_weights = no_weights && !(weight > 0.0 && std::isfinite(weight));
  Row s;
  for (size_t j = 0; j < u.size(); ++j)
    s.push_back(double(k[j]) * k[j] * (no_weights ? 1.0 : u[j]));
  return s;
}

std::vector<int> Order(const Row& s) {
  std::vector<int> order(s.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const double x = s[size_t(a)], y = s[size_t(b)];
    return std::isnan(y) ? false : std::isnan(x) || x > y;
  });
  return order;
}

Mask Select(const Row& s, int kept) {
  Mask mask(s.size(), 0);
  const std::vector<int> order = Order(s);
  for (int i = 0; i < kept; ++i) mask[size_t(order[size_t(i)])] = 1;
  return mask;
}

double MeanBelow(const Row& s, double threshold) {
  double sum = 0.0, n = 0.0;
  for (double x : s) {
    if (x < threshold) sum += x, n += 1.0;
  }
  return n > 0.0 ? sum / n : 0.0;
}

Row RestoreTable(const Row& u, sparkv_recover how) {
  double largest = 0.0;
  for (double weight : u) {
    if (std::isfinite(weight)) largest = std::max(largest, weight);
  }
  Row a;
  for (double weight : u) {
    if (largest == 0.0) {
      a.push_back(1.0);
    } else if (!std::isfinite(weight) || weight <= 1e-12 * largest) {
      a.push_back(0.0);
    } else {
      a.push_back(how == SPARKV_RECOVER_PAPER ? 1.0 / weight : 1.0 / std::sqrt(weight));
    }
  }
  return a;
}

Row RecoverKey(const float* k, const Row& u, const Mask& mask, sparkv_recover how) {
  const Row a = RestoreTable(u, how), s = Contribution(k, u);
  double c = 0.0;
  if (how == SPARKV_RECOVER_MEAN) {
    const int kept = int(std::count(mask.begin(), mask.end(), 1));
    if (kept == 0) {
      c = std::accumulate(s.begin(), s.end(), 0.0) / double(s.size());
    } else {
      Row kept_s;
      for (size_t j = 0; j < s.size(); ++j) {
        if (mask[j] != 0) kept_s.push_back(s[j]);
      }
      c = MeanBelow(s, Threshold(kept_s, kept));
    }
    c = std::sqrt(c);
  } else if (how == SPARKV_RECOVER_PAPER) {
    double sum = 0.0, n = 0.0;
    for (size_t j = 0; j < s.size(); ++j) {
      if (mask[j] == 0 && a[j] != 0.0) sum += std::fabs(k[j]) / a[j], n += 1.0;
    }
    c = n > 0.0 ? sum / n : 0.0;
  }
  Row out;
  for (size_t j = 0; j < s.size(); ++j) {
    if (mask[j] != 0) {
      out.push_back(k[j]);
    } else if (how == SPARKV_RECOVER_ZERO || a[j] == 0.0) {
      out.push_back(0.0);
    } else {
      out.push_back(Sign(k[j]) * c * a[j]);
    }
  }
  return out;
}

int SelectGroup(const float* k, const Row& u, Mask* mask) {
  const int head_dim = int(u.size());
  const Row s = Contribution(k, u);
  Row sum;
  double total = 0.0;
  for (int j : Order(s)) sum.push_back(total += s[size_t(j)]);
  int first_above = 0;
  for (int i = head_dim - 1; i >= 0; --i) {
    if (sum[size_t(i)] > 0.99 * total) first_above = i;
  }
  int group = 0;
  for (double border : {0.2, 0.4, 0.6, 0.8}) group += first_above > int(border * head_dim);
  const double share[5] = {0.1, 0.3, 0.5, 0.7, 0.9};
  *mask = Select(s, std::max(1, int(share[group] * head_dim)));
  return group;
}

Row RecoverSampled(const float* k, const Row& u, int kept, const float* draws, Draw draw,
                   Over over) {
  const size_t head_dim = u.size();
  const Row s = Contribution(k, u);
  const Row a = RestoreTable(u, SPARKV_RECOVER_MEAN);
  const std::vector<int> order = Order(s);
  const Mask mask = Select(s, kept);
  const double mean = std::accumulate(s.begin(), s.end(), 0.0) / double(head_dim);
  Row x;
  for (size_t j = 0; j < head_dim; ++j) {
    x.push_back(draw == Draw::kExponential ? std::max(mean, 1e-5) * draws[j]
                                           : std::fabs(mean + std::sqrt(Variance(s)) * draws[j]));
  }
  std::sort(x.begin(), x.end(), std::greater<double>());
  // With nothing kept there is no threshold: no draw is above it and the mean is that of all
  // channels.
  const double threshold = kept > 0 ? Threshold(s, kept) : std::numeric_limits<double>::infinity();
  const double instead = over == Over::kMean ? MeanBelow(s, threshold) : threshold;
  Row out(head_dim);
  for (size_t rank = 0; rank < head_dim; ++rank) {
    const size_t j =
        size_t(order[rank]);  // the largest draw goes to the channel that contributes most
    const double magnitude = std::sqrt(x[rank] > threshold ? instead : x[rank]) * a[j];
    out[j] = mask[j] != 0 ? double(k[j]) : Sign(k[j]) * magnitude;
  }
  return out;
}

Row RecoverSwitchesOff(const float* k, const Row& u, double ratio) {
  const int head_dim = int(u.size());
  const Row s = Contribution(k, u), a = RestoreTable(u, SPARKV_RECOVER_MEAN);
  const Mask mask = Select(s, Kept(ratio, head_dim));
  const double c = MeanBelow(s, Threshold(s, std::max(1, int(ratio * head_dim))));
  Row out;
  for (size_t j = 0; j < u.size(); ++j) {
    out.push_back(mask[j] != 0 ? double(k[j]) : Sign(k[j]) * std::sqrt(c) * a[j]);
  }
  return out;
}

PrunedValues PruneValues(const float* v, int n_tokens, int head_dim, double ratio,
                         sparkv_recover how) {
  const Row score = ValueScores(v, n_tokens, head_dim);
  PrunedValues pruned;
  for (int t = 0; t < n_tokens; ++t) {
    const Row of_token(score.begin() + t * head_dim, score.begin() + (t + 1) * head_dim);
    const Mask mask = Select(of_token, Kept(ratio, head_dim));
    pruned.mask.insert(pruned.mask.end(), mask.begin(), mask.end());
  }
  pruned.out = FillValues(v, pruned.mask, head_dim, how);
  return pruned;
}

PrunedValues PruneValuesTopP(const float* v, int n_tokens, int head_dim, double top_p,
                             sparkv_recover how) {
  const Row score = ValueScores(v, n_tokens, head_dim);
  double total = 0.0;
  for (double x : score) total += std::isfinite(x) ? x : 0.0;
  PrunedValues pruned;
  pruned.mask.assign(score.size(), 0);
  double sum = 0.0;
  for (int i : Order(score)) {
    pruned.mask[size_t(i)] = 1;
    sum += std::isfinite(score[size_t(i)]) ? score[size_t(i)] : 0.0;
    if (sum > top_p * total) break;
  }
  pruned.out = FillValues(v, pruned.mask, head_dim, how);
  return pruned;
}

Mask ThinkMask(const float* q, int group, int n_queries, const float* k, int n_tokens, int head_dim,
               double ratio) {
  const auto mean_square = [head_dim](const float* x, int n_rows, int j) {
    double sum = 0.0, n = 0.0;
    for (int row = 0; row < n_rows; ++row) {
      const double value = x[size_t(row) * size_t(head_dim) + size_t(j)];
      if (std::isfinite(value)) sum += value * value, n += 1.0;
    }
    return n > 0.0 ? sum / n : 0.0;
  };
  Row score;
  for (int j = 0; j < head_dim; ++j) {
    score.push_back(mean_square(q, group * n_queries, j) * mean_square(k, n_tokens, j));
  }
  return Select(score, Kept(ratio, head_dim));
}

}  // namespace sparkv::reference

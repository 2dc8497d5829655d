#include "method/recover.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "method/saliency.h"
#include "method/select.h"

namespace sparkv {
namespace {

double MeanScalar(const float* k, const float* u, const uint8_t* mask, int head_dim) {
  float s[kMaxSelect];
  Contribution(k, u, head_dim, s);
  // NaN counts as largest, so it is the threshold only if nothing else is kept; then nothing lies
  // below it.
  bool any_kept = false;
  float threshold = std::numeric_limits<float>::quiet_NaN();
  for (int j = 0; j < head_dim; ++j) {
    if (mask[j] == 0) continue;
    any_kept = true;
    threshold = std::fmin(threshold, s[j]);
  }
  double sum = 0.0;
  int count = 0;
  for (int j = 0; j < head_dim; ++j) {
    if (any_kept && !(s[j] < threshold)) continue;
    sum += s[j];
    ++count;
  }
  return std::sqrt(sum / std::max(1, count));
}

double PaperScalar(const float* k, const double* a, const uint8_t* mask, int head_dim) {
  double sum = 0.0;
  int count = 0;
  for (int j = 0; j < head_dim; ++j) {
    if (mask[j] != 0 || a[j] == 0.0) continue;
    sum += std::fabs(double(k[j])) / a[j];
    ++count;
  }
  return sum / std::max(1, count);
}

}  // namespace

void RestoreTable(const float* u, int head_dim, sparkv_recover how, double* a) {
  double largest = 0.0;
  for (int j = 0; j < head_dim; ++j) {
    if (std::isfinite(u[j])) largest = std::max(largest, double(u[j]));
  }
  for (int j = 0; j < head_dim; ++j) {
    if (largest == 0.0) {
      a[j] = 1.0;
    } else if (!std::isfinite(u[j]) || double(u[j]) <= kDeadWeight * largest) {
      a[j] = 0.0;
    } else {
      a[j] = 1.0 / (how == SPARKV_RECOVER_PAPER ? double(u[j]) : std::sqrt(double(u[j])));
    }
  }
}

void RecoverKey(const float* k, const float* u, const uint8_t* mask, int head_dim,
                sparkv_recover how, float* out) {
  double a[kMaxSelect];
  double c = 0.0;
  if (how != SPARKV_RECOVER_ZERO) {
    RestoreTable(u, head_dim, how, a);
    c = how == SPARKV_RECOVER_MEAN ? MeanScalar(k, u, mask, head_dim)
                                   : PaperScalar(k, a, mask, head_dim);
  }
  for (int j = 0; j < head_dim; ++j) {
    if (mask[j] != 0) {
      out[j] = k[j];
    } else if (how == SPARKV_RECOVER_ZERO || a[j] == 0.0) {
      out[j] = 0.0f;
    } else {
      out[j] = float(k[j] > 0.0f ? c * a[j] : -c * a[j]);
    }
  }
}

}  // namespace sparkv

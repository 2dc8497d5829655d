#include "method/observe.h"

#include <cmath>
#include <vector>

namespace sparkv {

void QueryEnergy(const float* q, size_t head_stride, int group, int head_dim, sparkv_group how,
                 float* energy) {
  for (int j = 0; j < head_dim; ++j) {
    double sum = 0.0;
    for (int g = 0; g < group; ++g) {
      const double x = q[size_t(g) * head_stride + size_t(j)];
      sum += how == SPARKV_GROUP_SIGNED ? x : x * x;
    }
    const double mean = sum / group;
    energy[j] = float(how == SPARKV_GROUP_SIGNED ? mean * mean : mean);
  }
}

void ChannelWeight(const float* q, int group, int n_queries, int head_dim, sparkv_group how,
                   float* u) {
  std::vector<float> energy(size_t(head_dim), 0.0f);
  std::vector<double> sum(size_t(head_dim), 0.0);
  for (int w = 0; w < n_queries; ++w) {
    QueryEnergy(q + size_t(w) * size_t(head_dim), size_t(n_queries) * size_t(head_dim), group,
                head_dim, how, energy.data());
    for (int j = 0; j < head_dim; ++j) sum[size_t(j)] += energy[size_t(j)];
  }
  for (int j = 0; j < head_dim; ++j) u[j] = float(std::sqrt(sum[size_t(j)]));
}

void ShareInPairs(float* energy, int head_dim, int n_rot, bool neox) {
  if (n_rot < 0 || n_rot > head_dim) return;
  for (int i = 0; i < n_rot / 2; ++i) {
    float& a = energy[neox ? i : 2 * i];
    float& b = energy[neox ? i + n_rot / 2 : 2 * i + 1];
    a = b = 0.5f * (a + b);
  }
}

}  // namespace sparkv

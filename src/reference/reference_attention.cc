#include <cmath>
#include <limits>

#include "reference/reference.h"

namespace sparkv::reference {
namespace {

// ALiBi slope of one head, as ggml has it; 1 without ALiBi, so that a mask is added as it is.
double Slope(double max_bias, int n_heads, int head) {
  if (max_bias <= 0.0) return 1.0;
  const int power_of_two = 1 << int(std::floor(std::log2(n_heads)));
  if (head < power_of_two) return std::pow(2.0, -max_bias / power_of_two * (head + 1));
  return std::pow(2.0, -max_bias / 2.0 / power_of_two * (2 * (head - power_of_two) + 1));
}

}  // namespace

Row Attend(const Attention& args) {
  constexpr double kUnseen = -std::numeric_limits<double>::infinity();
  const int group = args.n_heads / args.n_kv_heads;
  Row out;
  for (int t = 0; t < args.n_tokens; ++t) {
    for (int h = 0; h < args.n_heads; ++h) {
      const float* q = args.q + (size_t(t) * size_t(args.n_heads) + size_t(h)) * size_t(args.k_dim);
      const auto kv_row = [&](int i) {
        return size_t(i) * size_t(args.n_kv_heads) + size_t(h / group);
      };
      Row score;
      double largest = args.sinks != nullptr ? args.sinks[h] : kUnseen;
      for (int i = 0; i < args.n_kv; ++i) {
        const double bias = args.mask != nullptr
                                ? Slope(args.max_bias, args.n_heads, h) *
                                      args.mask[size_t(t) * size_t(args.n_kv) + size_t(i)]
                                : 0.0;
        double s = 0.0;
        for (int j = 0; j < args.k_dim; ++j)
          s += double(q[j]) * args.k[kv_row(i) * size_t(args.k_dim) + size_t(j)];
        s *= args.scale;
        if (args.softcap != 0.0) s = args.softcap * std::tanh(s / args.softcap);
        score.push_back(bias == kUnseen ? kUnseen : s + bias);
        largest = score.back() > largest ? score.back() : largest;
      }
      double weights = args.sinks != nullptr ? std::exp(args.sinks[h] - largest) : 0.0;
      Row sum(size_t(args.v_dim), 0.0);
      for (int i = 0; i < args.n_kv; ++i) {
        if (score[size_t(i)] == kUnseen) continue;
        const double weight = std::exp(score[size_t(i)] - largest);
        weights += weight;
        for (int j = 0; j < args.v_dim; ++j)
          sum[size_t(j)] += weight * args.v[kv_row(i) * size_t(args.v_dim) + size_t(j)];
      }
      for (double x : sum) out.push_back(weights == 0.0 ? 0.0 : x / weights);
    }
  }
  return out;
}

}  // namespace sparkv::reference

#include "cache/row_errors.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"

namespace sparkv {

RowErrors::RowErrors(const LayerLayout& layer, int steps) : queries_(layer.k_row(), 0.0) {
  for (const bool keys : {true, false}) {
    Sums& sums = keys ? keys_ : values_;
    sums.dim = keys ? layer.k_dim() : layer.v_dim();
    sums.square.assign(keys ? layer.k_row() : layer.v_row(), 0.0);
    sums.error.assign(size_t(steps), sums.square);
    sums.coded.assign(size_t(steps), 0);
  }
}

void RowErrors::AddQueries(const float* energies) {
  for (size_t j = 0; j < queries_.size(); ++j) {
    if (std::isfinite(energies[j])) queries_[j] += energies[j];
  }
}

void RowErrors::Add(bool keys, int step, bool first, const uint16_t* before,
                    const uint16_t* after) {
  Sums& sums = keys ? keys_ : values_;
  const size_t n = sums.square.size();
  const auto finite = [](uint16_t half) { return (half & 0x7c00u) != 0x7c00u; };
  if (!std::all_of(before, before + n, finite) || !std::all_of(after, after + n, finite)) return;
  std::vector<double>& error = sums.error[size_t(step)];
  for (size_t j = 0; j < n; ++j) {
    const double x = HalfToFloat(before[j]), off = x - double(HalfToFloat(after[j]));
    error[j] += off * off;
    if (first) sums.square[j] += x * x;
  }
  ++sums.coded[size_t(step)];
  if (first) ++sums.rows;
}

double RowErrors::Relative(const Sums& sums, int head, bool weighted) const {
  double error = 0.0, square = 0.0;
  for (size_t i = 0; i < size_t(sums.dim); ++i) {
    const size_t j = size_t(head) * size_t(sums.dim) + i;
    const double weight = weighted ? queries_[j] : 1.0;
    if (sums.rows > 0) square += weight * sums.square[j] / double(sums.rows);
    for (size_t step = 0; step < sums.error.size(); ++step) {
      if (sums.coded[step] > 0) error += weight * sums.error[step][j] / double(sums.coded[step]);
    }
  }
  return square > 0.0 ? std::sqrt(error / square) : 0.0;
}

}  // namespace sparkv

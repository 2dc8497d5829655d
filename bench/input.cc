#include <cmath>
#include <cstdlib>
#include <iostream>
#include <random>

#include "base/half.h"
#include "bench.h"

namespace sparkv::bench {
namespace {

// Channels of a head as keys weighted by queries have them: a few stand out, the others fall
// steadily. With these, heads share bits as half of those of SmolLM2 do (6321 for balanced); with
// channels all alike (3333) rows would be read in another way.
std::vector<float> KeyScales(int dim) {
  std::vector<float> scales(static_cast<size_t>(dim));
  double energy = 0.0;
  for (int j = 0; j < dim; ++j) {
    const double rank = double(j * 19 % dim) / dim,
                 db = (rank < 1.0 / 16 ? 14.0 : 0.0) - 22.0 * rank;
    energy += std::pow(10.0, db / 10);
    scales[size_t(j)] = float(std::pow(10.0, db / 20));
  }
  for (float& x : scales) x *= float(std::sqrt(1.8 * dim / energy));
  return scales;
}

}  // namespace

std::string Case::name() const {
  std::string name = what + "/" + side;
  if (!simd.empty()) name += "/" + simd;
  if (attends()) name += "/tokens=" + std::to_string(tokens);
  if (what != "decode") name += "/rows=" + std::to_string(queries);
  name += "/threads=" + std::to_string(threads);
  if (attends()) name += "/sequences=" + std::to_string(sequences);
  if (sequences > 1) name += "/" + streams;
  return name;
}

std::vector<uint16_t> Rows(const Shape& shape, int n, bool keys) {
  std::mt19937 rng(keys ? 1 : 2);
  std::normal_distribution<float> normal;
  std::vector<float> cycle(1 << 16);
  for (float& x : cycle) x = normal(rng);
  const std::vector<float> scales = KeyScales(shape.dim);
  std::vector<uint16_t> rows(shape.row() * size_t(n));
  for (size_t i = 0; i < rows.size(); ++i) {
    const float scale = keys ? scales[i % scales.size()] : 1.0f;
    rows[i] = FloatToHalf(scale * cycle[(i + i / 40503) % cycle.size()]);
  }
  return rows;
}

std::vector<float> ToFloats(const std::vector<uint16_t>& rows) {
  std::vector<float> floats(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) floats[i] = HalfToFloat(rows[i]);
  return floats;
}

std::vector<float> Queries(const Shape& shape, int n) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t(n) * size_t(shape.n_heads()) * size_t(shape.dim));
  for (float& x : q) x = normal(rng);
  return q;
}

void Fail(int code, const std::string& text) {
  std::cerr << "attend_bench: " << text << "\n";
  std::exit(code);
}

}  // namespace sparkv::bench

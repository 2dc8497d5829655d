// What is known of a model before its first prompt: how strongly its queries and keys use each
// channel, and what a lost bit costs in which layer. Ours; bytes in docs/format.md, "calibration".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

// Mean squares of queries (of all heads of a group) and of keys, [n_kv_heads][k_dim] each.
struct LayerEnergies {
  int32_t number = 0;  // of the layer in the model
  int32_t n_kv_heads = 0, k_dim = 0;
  std::vector<float> queries, keys;
  size_t size() const { return size_t(n_kv_heads) * size_t(k_dim); }
};

struct Calibration {
  std::string model;        // what it was made for, as the tool that made it names it
  std::string sensitivity;  // as sparkv_config has it; empty: not measured
  std::vector<LayerEnergies> layers;

  const LayerEnergies* Layer(int32_t number) const;
};

std::string CalibrationBytes(const Calibration& calibration);
// Bytes are hostile. *calibration is only set when all of them are good.
Status ReadCalibration(const void* bytes, size_t size, Calibration* calibration);

// What it says about layers, for a configuration that was checked (sparkv_config_calibration).
Status ApplyCalibration(const Calibration& calibration, sparkv_config* config);

// Sums of squares while a model runs.
struct EnergySums {
  std::vector<double> queries, keys;  // [n_kv_heads][k_dim]
  int64_t n = 0;                      // tokens
  int rope_rot = 0;                   // as in sparkv_attend_args
  bool rope_neox = false;
};

// Correlation of two sets of energies, head by head, of their logarithms: two texts give above .9
// for one model (.47 where one repeats a digit), another model's .2 (docs/results.md). a, b:
// [n_heads][dim]
double LikenessOf(const float* a, const float* b, int n_heads, int dim);
inline constexpr double kLeastLikeness = 0.3;
inline constexpr int64_t kTokensToTell = 32;  // a model by

}  // namespace sparkv

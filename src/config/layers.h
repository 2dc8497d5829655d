// What differs by layer: presets of their own, protection, and the budget that chooses between
// them.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

inline constexpr int kMaxLayer = 9999;

// The parameters layers, protect, budget and sensitivity of SetParameter.
Status SetLayers(std::string_view value, sparkv_config* config);
Status SetProtect(std::string_view value, sparkv_config* config);
Status SetBudget(std::string_view value, sparkv_config* config);
Status SetSensitivity(std::string_view value, sparkv_config* config);
// Their part of CheckConfig.
Status CheckLayers(const sparkv_config& config);

// What counts for one layer of the model (sparkv_config_layer). Leaves *config as it was when it
// fails.
Status SetLayer(int32_t layer, int32_t n_layers, sparkv_config* config);

struct Budget {
  enum { kNone, kAuto, kBits, kBytes } kind = kNone;
  double amount = 0.0;  // bits per element, or bytes
};
Status ParseBudget(std::string_view text, Budget* budget);

// Of a configuration that was checked: what a lost bit costs in this layer; whether a budget leaves
// the layer alone, which has rows of its own or is protected; the entries of config.layers that
// name layers. The middle is no name: it is what presets have where nothing tells layers apart.
double SensitivityOf(const sparkv_config& config, int32_t layer, int32_t n_layers);
bool HasRule(const sparkv_config& config, int32_t layer, int32_t n_layers);
std::string NamedLayers(const sparkv_config& config);

}  // namespace sparkv

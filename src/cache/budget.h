// Layers, keys and values that share a budget of bytes (sparkv_config_budget). Ours.
#pragma once

#include <span>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

// Every field inside its range, or the first one that is not.
Status CheckShape(const sparkv_shape& shape);

// Shapes and *config were checked. Leaves *config as it was when it fails.
Status SolveBudget(std::span<const sparkv_shape> shapes, sparkv_config* config);

// The model's number of layer i of a shape, and how many layers the model has.
int32_t LayerNumber(const sparkv_shape& shape, int32_t i);
int32_t ModelLayers(std::span<const sparkv_shape> shapes);

}  // namespace sparkv

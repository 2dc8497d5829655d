// Names of the codecs of others that a cache can stand in for (baselines/baseline.h).
#pragma once

#include <string_view>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

enum class Codec { kNone, kKivi, kTurboQuant, kThink, kMustafar, kQ8_0, kQ5_1, kQ4_0 };
struct Baseline {
  Codec codec = Codec::kNone;
  int bits = 0;        // of a number: kivi-2, turboquant-3
  double ratio = 0.0;  // share that is pruned: think-0.5
};
// No codec for an empty text.
Status ParseBaseline(std::string_view text, Baseline* baseline);

// The parameter baseline of SetParameter.
Status SetBaseline(std::string_view value, sparkv_config* config);
// Its part of CheckConfig: a baseline goes with the rows of preset exact in all layers.
Status CheckBaseline(const sparkv_config& config);

}  // namespace sparkv

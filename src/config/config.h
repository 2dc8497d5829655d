// Presets and parameters: names to numbers, once, at the border. Numbers are read without regard to
// the locale.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

inline constexpr std::string_view kDefaultPreset = "balanced";

// Channels kept of head_dim: head_dim - int(ratio * head_dim), the double product truncated. ratio
// in [0, 1].
inline int KeptChannels(double ratio, int head_dim) {
  return head_dim - static_cast<int>(ratio * head_dim);
}

// All leave *config as it was when they fail; config->struct_size is never touched.
Status SetPreset(std::string_view name, sparkv_config* config);
Status SetParameter(std::string_view key, std::string_view value, sparkv_config* config);

// A configuration may come from C as plain numbers: every field inside its range, or the first one
// that is not.
Status CheckConfig(const sparkv_config& config);

// "spark-0.5-i5 ratio 0.5 recover mean kept i5 values q4 sinks 4 window 96 seal stream". Group,
// observe, simd and threads follow when they are not what a preset of that kind starts from.
std::string ConfigText(const sparkv_config& config);

// A quoted value for an error text: one line, at most 64 characters.
std::string Quote(std::string_view text);

}  // namespace sparkv

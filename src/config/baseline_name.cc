#include "config/baseline_name.h"

#include <cstring>
#include <string>

#include "config/config.h"
#include "config/parse.h"

namespace sparkv {
namespace {

constexpr struct {
  std::string_view name;
  Codec codec;
  int bits;
} kWholeNames[] = {{"kivi-2", Codec::kKivi, 2},
                   {"kivi-4", Codec::kKivi, 4},
                   {"turboquant-2", Codec::kTurboQuant, 2},
                   {"turboquant-3", Codec::kTurboQuant, 3},
                   {"turboquant-4", Codec::kTurboQuant, 4},
                   {"q8_0-rows", Codec::kQ8_0, 8},
                   {"q5_1-rows", Codec::kQ5_1, 5},
                   {"q4_0-rows", Codec::kQ4_0, 4}};
// Followed by a ratio.
constexpr struct {
  std::string_view prefix;
  Codec codec;
} kRatioNames[] = {{"think-", Codec::kThink}, {"mustafar-", Codec::kMustafar}};

Status Unknown(std::string_view text) {
  std::string list;
  for (const auto& known : kWholeNames) list += std::string(known.name) + ", ";
  return Status::Invalid("baseline: " + Quote(text) + " is unknown (" + list +
                         "think-R, mustafar-R with R in [0, 1])");
}

}  // namespace

Status ParseBaseline(std::string_view text, Baseline* baseline) {
  *baseline = {};
  if (text.empty()) return Status::Ok();
  if (text.size() >= sizeof(sparkv_config::baseline)) return Unknown(text);
  for (const auto& known : kWholeNames) {
    if (text != known.name) continue;
    *baseline = {known.codec, known.bits, 0.0};
    return Status::Ok();
  }
  for (const auto& known : kRatioNames) {
    if (!text.starts_with(known.prefix)) continue;
    double ratio = 0.0;
    const Parse parse =
        ParseNumber(text.substr(known.prefix.size()), &ratio, std::chars_format::fixed);
    if (parse != Parse::kOk || !(ratio >= 0.0 && ratio <= 1.0)) break;
    *baseline = {known.codec, 0, ratio};
    return Status::Ok();
  }
  return Unknown(text);
}

Status SetBaseline(std::string_view value, sparkv_config* config) {
  Baseline baseline;
  if (Status s = ParseBaseline(value, &baseline); !s.ok()) return s;
  std::memset(config->baseline, 0, sizeof(config->baseline));
  std::memcpy(config->baseline, value.data(), value.size());
  return Status::Ok();
}

Status CheckBaseline(const sparkv_config& config) {
  const std::string_view name = TextOf(config.baseline);
  if (name.size() == sizeof(config.baseline))
    return Status::Invalid("baseline: the text has no end");
  Baseline baseline;
  if (Status s = ParseBaseline(name, &baseline); !s.ok()) return s;
  if (baseline.codec == Codec::kNone) return Status::Ok();
  if (config.ratio == 0.0 && config.kept == SPARKV_F16 && config.values == SPARKV_F16 &&
      TextOf(config.layers).empty() && TextOf(config.budget).empty() && config.protect_first == 0 &&
      config.protect_last == 0 && config.evict == SPARKV_EVICT_NONE) {
    return Status::Ok();
  }
  return Status::Invalid("baseline: " + Quote(name) +
                         " goes with the rows of preset exact in all layers, not with " +
                         ConfigText(config));
}

}  // namespace sparkv

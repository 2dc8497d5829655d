#include "config/layers.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "config/config.h"
#include "config/parse.h"

namespace sparkv {
namespace {

// "3" or "0-4", inside 0..kMaxLayer.
bool ParseLayers(std::string_view text, int* first, int* last) {
  const size_t dash = text.find('-');
  if (ParseNumber(text.substr(0, dash), first) != Parse::kOk) return false;
  *last = *first;
  if (dash != std::string_view::npos && ParseNumber(text.substr(dash + 1), last) != Parse::kOk)
    return false;
  return *first >= 0 && *first <= *last && *last <= kMaxLayer;
}

constexpr std::string_view kMiddle = "middle";

// Layers from .55 to .7 of a model's depth: two models as unlike as SmolLM2-135M and Gemma-3-270m
// lose most there by far (docs/results.md, "middle").
bool IsMiddle(int32_t layer, int32_t n_layers) {
  return 20 * int64_t{layer} >= 11 * int64_t{n_layers} &&
         10 * int64_t{layer} < 7 * int64_t{n_layers};
}
// What a bit lost there costs beside one in another layer, a mean over them.
constexpr double kMiddleSensitivity = 4.0;

// An entry of config.layers: from `first` to `last`, or in the middle, the rows of `rows`.
struct LayerRule {
  bool middle = false;
  int first = 0, last = 0;
  sparkv_config rows = {};
  bool Has(int32_t layer, int32_t n_layers) const {
    return middle ? IsMiddle(layer, n_layers) : layer >= first && layer <= last;
  }
};

Status ParseLayerRule(std::string_view text, LayerRule* rule) {
  const auto wrong = [&](const std::string& why) {
    return Status::Invalid("layers: " + Quote(text) + " " + why);
  };
  const size_t equals = text.find('=');
  if (equals == std::string_view::npos)
    return wrong("is not LAYER=PRESET, FIRST-LAST=PRESET or middle=PRESET");
  rule->middle = text.substr(0, equals) == kMiddle;
  if (!rule->middle && !ParseLayers(text.substr(0, equals), &rule->first, &rule->last))
    return wrong("names no layers in 0.." + std::to_string(kMaxLayer));
  std::string_view preset = text.substr(equals + 1), values;
  if (const size_t plus = preset.find('+'); plus != std::string_view::npos) {
    values = preset.substr(plus + 1);
    preset = preset.substr(0, plus);
    if (values.empty()) return wrong("has no values behind the +");
  }
  if (preset.empty()) return wrong("names no preset");
  rule->rows.struct_size = sizeof(rule->rows);
  if (Status s = SetPreset(preset, &rule->rows); !s.ok()) return s;
  return values.empty() ? Status::Ok() : SetParameter("values", values, &rule->rows);
}

bool Protected(const sparkv_config& config, int32_t layer, int32_t n_layers) {
  return layer < config.protect_first || layer >= n_layers - config.protect_last;
}

// Calls body(rule) for each entry, in order.
template <typename Body>
Status ForEachLayerRule(std::string_view layers, Body&& body) {
  return ForEachEntry(layers, [&](std::string_view entry) -> Status {
    LayerRule rule;
    if (Status s = ParseLayerRule(entry, &rule); !s.ok()) return s;
    body(rule);
    return Status::Ok();
  });
}

// Calls body(first, last, sensitivity) for each entry, in order.
template <typename Body>
Status ForEachSensitivity(std::string_view list, Body&& body) {
  return ForEachEntry(list, [&](std::string_view entry) -> Status {
    const size_t colon = entry.find(':');
    int first = 0, last = 0;
    double x = 0.0;
    if (colon == std::string_view::npos || !ParseLayers(entry.substr(0, colon), &first, &last) ||
        ParseNumber(entry.substr(colon + 1), &x) != Parse::kOk || !(x >= 0.0) || x > 1e9) {
      return Status::Invalid("sensitivity: " + Quote(entry) +
                             " is not LAYER:NUMBER or FIRST-LAST:NUMBER, 0 to 1e9");
    }
    body(first, last, x);
    return Status::Ok();
  });
}

}  // namespace

Status SetLayers(std::string_view value, sparkv_config* config) {
  if (value == "none") value = "";
  if (Status s = ForEachLayerRule(value, [](const LayerRule&) {}); !s.ok()) return s;
  return SetText("layers", value, &config->layers);
}

Status SetSensitivity(std::string_view value, sparkv_config* config) {
  if (Status s = ForEachSensitivity(value, [](int, int, double) {}); !s.ok()) return s;
  return SetText("sensitivity", value, &config->sensitivity);
}

Status SetBudget(std::string_view value, sparkv_config* config) {
  Budget budget;
  if (Status s = ParseBudget(value, &budget); !s.ok()) return s;
  return SetText("budget", value, &config->budget);
}

// "first:2,last:1", either alone, or nothing.
Status SetProtect(std::string_view value, sparkv_config* config) {
  int32_t first = 0, last = 0;
  const Status s = ForEachEntry(value, [&](std::string_view part) -> Status {
    int32_t* count = part.starts_with("first:")  ? &first
                     : part.starts_with("last:") ? &last
                                                 : nullptr;
    const Parse parse =
        count == nullptr ? Parse::kNotANumber : ParseNumber(part.substr(part.find(':') + 1), count);
    if (parse == Parse::kNotANumber)
      return Status::Invalid("protect: " + Quote(value) + " is not first:N, last:N or both");
    if (parse == Parse::kOutOfRange || *count < 0 || *count > kMaxLayer) {
      return Status::Invalid("protect: " + Quote(part) + " is outside 0.." +
                             std::to_string(kMaxLayer));
    }
    return Status::Ok();
  });
  if (!s.ok()) return s;
  config->protect_first = first;
  config->protect_last = last;
  return Status::Ok();
}

Status CheckLayers(const sparkv_config& config) {
  const auto endless = [](std::string_view text, size_t size) { return text.size() == size; };
  for (const auto& [key, open] :
       {std::pair("layers", endless(TextOf(config.layers), sizeof(config.layers))),
        std::pair("budget", endless(TextOf(config.budget), sizeof(config.budget))),
        std::pair("sensitivity",
                  endless(TextOf(config.sensitivity), sizeof(config.sensitivity)))}) {
    if (open) return Status::Invalid(std::string(key) + ": the text has no end");
  }
  Budget budget;
  if (Status s = ParseBudget(TextOf(config.budget), &budget); !s.ok()) return s;
  if (Status s = ForEachSensitivity(TextOf(config.sensitivity), [](int, int, double) {}); !s.ok())
    return s;
  return ForEachLayerRule(TextOf(config.layers), [](const LayerRule&) {});
}

Status ParseBudget(std::string_view text, Budget* budget) {
  *budget = {};
  if (text.empty()) return Status::Ok();
  if (text == "auto") {
    budget->kind = Budget::kAuto;
    return Status::Ok();
  }
  constexpr struct {
    std::string_view name;
    double bytes;
  } kUnits[] = {{"bpe", 0},      {"B", 1},    {"KiB", 0x1p10}, {"MiB", 0x1p20},
                {"GiB", 0x1p30}, {"KB", 1e3}, {"MB", 1e6},     {"GB", 1e9}};
  size_t at = 0;
  while (at < text.size() && (text[at] == '.' || (text[at] >= '0' && text[at] <= '9'))) ++at;
  double number = 0.0;
  if (ParseNumber(text.substr(0, at), &number) == Parse::kOk && number > 0.0 && number <= 1e15) {
    for (const auto& unit : kUnits) {
      if (text.substr(at) != unit.name) continue;
      budget->kind = unit.bytes == 0 ? Budget::kBits : Budget::kBytes;
      budget->amount = unit.bytes == 0 ? number : number * unit.bytes;
      return Status::Ok();
    }
  }
  return Status::Invalid(
      "budget: " + Quote(text) +
      " is not auto, bits such as 4bpe or bytes such as 512MiB (B, KiB, MiB, GiB,"
      " KB, MB, GB)");
}

double SensitivityOf(const sparkv_config& config, int32_t layer, int32_t n_layers) {
  const bool told = !TextOf(config.sensitivity).empty();
  double sensitivity = !told && IsMiddle(layer, n_layers) ? kMiddleSensitivity : 1.0;
  (void)ForEachSensitivity(TextOf(config.sensitivity), [&](int first, int last, double x) {
    if (layer >= first && layer <= last) sensitivity = x;
  });
  return sensitivity;
}

bool HasRule(const sparkv_config& config, int32_t layer, int32_t n_layers) {
  bool has = Protected(config, layer, n_layers);
  (void)ForEachLayerRule(NamedLayers(config),
                         [&](const LayerRule& rule) { has = has || rule.Has(layer, n_layers); });
  return has;
}

std::string NamedLayers(const sparkv_config& config) {
  std::string named;
  (void)ForEachEntry(TextOf(config.layers), [&](std::string_view entry) {
    if (!entry.starts_with(kMiddle)) named += (named.empty() ? "" : ",") + std::string(entry);
    return Status::Ok();
  });
  return named;
}

Status SetLayer(int32_t layer, int32_t n_layers, sparkv_config* config) {
  if (layer < 0 || layer > kMaxLayer) {
    return Status::Invalid(Outside("layer", std::to_string(layer), "0", std::to_string(kMaxLayer)));
  }
  sparkv_config next = *config;
  int beyond = -1;
  const Status s = ForEachLayerRule(TextOf(config->layers), [&](const LayerRule& rule) {
    if (!rule.middle && rule.first >= n_layers) beyond = rule.first;
    if (!rule.Has(layer, n_layers)) return;
    next.ratio = rule.rows.ratio;
    next.kept = rule.rows.kept;
    next.values = rule.rows.values;
  });
  if (!s.ok()) return s;
  if (beyond >= 0) {
    return Status::Invalid("layers: " + std::to_string(beyond) + " is none of the model's " +
                           std::to_string(n_layers) + " layers");
  }
  if (Protected(*config, layer, n_layers)) {
    next.ratio = 0.0;
    next.kept = next.values = SPARKV_INT8;
  }
  next.protect_first = next.protect_last = 0;
  std::memset(next.layers, 0, sizeof(next.layers));
  *config = next;
  return Status::Ok();
}

}  // namespace sparkv

#include "cache/budget.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cache/cache_layout.h"
#include "config/config.h"
#include "config/layers.h"
#include "config/parse.h"
#include "format/row_layout.h"

namespace sparkv {
namespace {

// Kinds of rows by falling loss: mean KL divergence with these keys and f16 values, or these values
// and dense keys (docs/results.md, "grid"; other rows cost more and lose more). Only the ratios of
// losses count.
struct Kind {
  const char* name;  // a preset, or values
  double loss;
};
constexpr Kind kKeys[] = {{"tiers-4210", .0387}, {"tiers-5321", .0055}, {"tiers-6321", .0036},
                          {"tiers-7432", .0009}, {"tiers-7543", .0004}, {"spark-0.3-i8", .0003},
                          {"spark-0-i8", .0001}, {"spark-0", 0.0}};
constexpr Kind kValues[] = {{"t1", .036},  {"t2", .0056},   {"t3", .0014},
                            {"t4", .0003}, {"q8", .000002}, {"f16", 0.0}};

// One layer that the budget may change. Loss and bytes by kind.
struct Layer {
  int32_t number = 0;
  size_t key = 0, value = 0;
  double sensitivity = 1.0;
  double key_bytes[std::size(kKeys)], value_bytes[std::size(kValues)];
};

// Keys and values of the tokens of a full cache: sinks and window dense, then the stages, the rest
// packed, weights of one sequence per stream.
struct FullLayer {
  double packed, dense;  // rows
  double streams;
  std::vector<RecentStage> stages;
  std::vector<double> in_stage;  // rows

  FullLayer(const sparkv_config& config, const sparkv_shape& shape, const sparkv_layer_shape& s)
      : streams(shape.n_streams), stages(RecentStages(config)) {
    const double heads = streams * s.n_kv_heads;
    double cells = double(shape.cells_per_stream);
    const auto take = [&](double most) {
      const double taken = std::min(cells, most);
      cells -= taken;
      return taken * heads;
    };
    dense = take(double(config.sinks) + double(config.window));
    int32_t before = config.window;
    for (const RecentStage& stage : stages) {
      in_stage.push_back(take(double(stage.until - before)));
      before = stage.until;
    }
    packed = cells * heads;
  }
  double rows() const { return std::accumulate(in_stage.begin(), in_stage.end(), dense + packed); }
  // rows: what the layer has; recovery is the cache's.
  double Keys(const sparkv_config& config, const sparkv_layer_shape& s,
              const sparkv_config& rows) const {
    const KeyLayout row = KeyLayout::Make(s.k_dim, KeptChannels(rows.ratio, s.k_dim),
                                          sparkv_number(rows.kept), sparkv_recover(config.recover));
    const double weights = row.needs_table() ? 2.0 * s.k_dim * s.n_kv_heads * streams : 0.0;
    double bytes = dense * 2.0 * s.k_dim + packed * row.bytes + weights;
    for (size_t i = 0; i < stages.size(); ++i)
      bytes += in_stage[i] * StageKey(stages[i], row).bytes;
    return bytes;
  }
  double Values(const sparkv_layer_shape& s, sparkv_number number) const {
    const ValueLayout row = ValueLayout::Make(s.v_dim, number);
    double bytes = dense * 2.0 * s.v_dim + packed * row.bytes;
    for (size_t i = 0; i < stages.size(); ++i)
      bytes += in_stage[i] * StageValue(stages[i], row).bytes;
    return bytes;
  }
};

// The next step of one layer: to kind `to` of its keys or values.
struct Step {
  Layer* layer = nullptr;
  bool keys = false;
  size_t to = 0;
  double bytes = 0.0, gain = -1.0;  // gain: loss removed per byte
};

template <size_t kKinds>
void Consider(Layer* layer, bool keys, size_t now, const Kind (&kinds)[kKinds],
              const double (&bytes)[kKinds], double left, Step* best) {
  for (size_t to = now + 1; to < kKinds; ++to) {
    const double more = bytes[to] - bytes[now];
    if (more > left) continue;
    const double less = layer->sensitivity * (kinds[now].loss - kinds[to].loss);
    const double gain = more > 0.0 ? less / more : less > 0.0 ? 1e30 : 0.0;
    if (gain > best->gain) *best = {layer, keys, to, more, gain};
  }
}

// "0-4=spark-0.5-i6+q4,5=...", layers in order of their numbers.
std::string LayersText(std::vector<Layer> layers) {
  std::sort(layers.begin(), layers.end(),
            [](const Layer& a, const Layer& b) { return a.number < b.number; });
  std::string text;
  for (size_t first = 0, end = 0; first < layers.size(); first = end) {
    const Layer& layer = layers[first];
    for (end = first + 1; end < layers.size() && layers[end].key == layer.key &&
                          layers[end].value == layer.value &&
                          layers[end].number == layers[end - 1].number + 1;) {
      ++end;
    }
    text += (text.empty() ? "" : ",") + std::to_string(layer.number);
    if (end > first + 1) text += "-" + std::to_string(layers[end - 1].number);
    text += std::string("=") + kKeys[layer.key].name + "+" + kValues[layer.value].name;
  }
  return text;
}

std::string Amount(const Budget& budget, double bytes, double elements) {
  if (budget.kind != Budget::kBits) return std::to_string(int64_t(bytes)) + " bytes";
  std::string bits = std::to_string(8.0 * bytes / elements);
  bits.resize(bits.find('.') + 3);
  return bits + " bits per element";
}

}  // namespace

Status CheckShape(const sparkv_shape& shape) {
  const auto outside = [](const std::string& field, int64_t value, const char* range) {
    return Status::Invalid(field + ": " + std::to_string(value) + " is outside " + range);
  };
  if (shape.n_layers < 1 || shape.n_layers > 4096)
    return outside("n_layers", shape.n_layers, "[1, 4096]");
  if (shape.n_model_layers < 0 || shape.n_model_layers > 10000)
    return outside("n_model_layers", shape.n_model_layers, "[0, 10000]");
  if (shape.layers == nullptr) return Status::Invalid("layers: NULL");
  if (shape.n_streams < 1 || shape.n_streams > 1024)
    return outside("n_streams", shape.n_streams, "[1, 1024]");
  const int64_t most = int64_t{1} << 30;
  if (shape.cells_per_stream < 1 || shape.cells_per_stream > most / shape.n_streams) {
    return outside("cells_per_stream", shape.cells_per_stream, "[1, 2^30 / n_streams]");
  }
  for (int i = 0; i < shape.n_layers; ++i) {
    const sparkv_layer_shape& layer = shape.layers[i];
    const std::string name = "layers[" + std::to_string(i) + "].";
    if (layer.n_kv_heads < 1 || layer.n_kv_heads > 1024)
      return outside(name + "n_kv_heads", layer.n_kv_heads, "[1, 1024]");
    if (!HeadDimAllowed(layer.k_dim))
      return outside(name + "k_dim", layer.k_dim, "32..512 in steps of 8");
    if (!HeadDimAllowed(layer.v_dim))
      return outside(name + "v_dim", layer.v_dim, "32..512 in steps of 8");
  }
  return Status::Ok();
}

int32_t LayerNumber(const sparkv_shape& shape, int32_t i) {
  return shape.layer_numbers != nullptr ? shape.layer_numbers[i] : i;
}

int32_t ModelLayers(std::span<const sparkv_shape> shapes) {
  int32_t n = 0;
  for (const sparkv_shape& shape : shapes) {
    n = std::max(n, shape.n_model_layers);
    for (int32_t i = 0; i < shape.n_layers && shape.n_model_layers == 0; ++i)
      n = std::max(n, LayerNumber(shape, i) + 1);
  }
  return n;
}

Status SolveBudget(std::span<const sparkv_shape> shapes, sparkv_config* config) {
  Budget budget;
  if (Status s = ParseBudget(config->budget, &budget); !s.ok()) return s;
  if (budget.kind == Budget::kNone) return Status::Ok();
  const int32_t n_model_layers = ModelLayers(shapes);
  std::vector<Layer> layers;
  double elements = 0.0, as_configured = 0.0, used = 0.0;
  for (const sparkv_shape& shape : shapes) {
    for (int32_t i = 0; i < shape.n_layers; ++i) {
      const sparkv_layer_shape& s = shape.layers[i];
      const FullLayer full(*config, shape, s);
      Layer layer;
      layer.number = LayerNumber(shape, i);
      sparkv_config rows = *config;
      if (Status status = SetLayer(layer.number, n_model_layers, &rows); !status.ok())
        return status;
      elements += full.rows() * double(s.k_dim + s.v_dim);
      const double bytes = full.Keys(*config, s, rows) + full.Values(s, sparkv_number(rows.values));
      as_configured += bytes;
      if (HasRule(*config, layer.number, n_model_layers)) {
        used += bytes;
        continue;
      }
      layer.sensitivity = SensitivityOf(*config, layer.number, n_model_layers);
      for (size_t k = 0; k < std::size(kKeys); ++k) {
        if (Status status = SetPreset(kKeys[k].name, &rows); !status.ok()) return status;
        layer.key_bytes[k] = full.Keys(*config, s, rows);
      }
      for (size_t k = 0; k < std::size(kValues); ++k) {
        if (Status status = SetParameter("values", kValues[k].name, &rows); !status.ok())
          return status;
        layer.value_bytes[k] = full.Values(s, sparkv_number(rows.values));
      }
      used += layer.key_bytes[0] + layer.value_bytes[0];
      layers.push_back(layer);
    }
  }
  const double allowed = budget.kind == Budget::kAuto   ? as_configured
                         : budget.kind == Budget::kBits ? budget.amount * elements / 8.0
                                                        : budget.amount;
  if (used > allowed && config->recent[0] != '\0') {
    // The oldest stage is given up first; what is left stands in the configuration.
    const std::string_view recent = TextOf(config->recent);
    const size_t comma = recent.rfind(',');
    sparkv_config fewer = *config;
    const std::string_view left = comma == recent.npos ? "none" : recent.substr(0, comma);
    if (Status s = SetParameter("recent", left, &fewer); !s.ok()) return s;
    if (Status s = SolveBudget(shapes, &fewer); !s.ok()) return s;
    *config = fewer;
    return Status::Ok();
  }
  if (used > allowed) {
    return Status::Invalid("budget: " + Quote(config->budget) + " is below the least that " +
                           std::to_string(n_model_layers) + " layers with sinks " +
                           std::to_string(config->sinks) + " and window " +
                           std::to_string(config->window) + " take here, " +
                           Amount(budget, used, elements));
  }
  for (;;) {
    Step best;
    for (Layer& layer : layers) {
      Consider(&layer, true, layer.key, kKeys, layer.key_bytes, allowed - used, &best);
      Consider(&layer, false, layer.value, kValues, layer.value_bytes, allowed - used, &best);
    }
    if (best.layer == nullptr) break;
    (best.keys ? best.layer->key : best.layer->value) = best.to;
    used += best.bytes;
  }
  std::string text = LayersText(std::move(layers));
  if (const std::string named = NamedLayers(*config); !named.empty())
    text += (text.empty() ? "" : ",") + named;
  sparkv_config next = *config;
  std::memset(next.budget, 0, sizeof(next.budget));
  std::memset(next.sensitivity, 0, sizeof(next.sensitivity));
  if (Status s = SetParameter("layers", text, &next); !s.ok()) return s;
  *config = next;
  return Status::Ok();
}

}  // namespace sparkv

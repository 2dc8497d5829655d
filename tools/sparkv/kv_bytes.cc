#include "kv_bytes.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "report.h"

namespace sparkv {
namespace {

// llama.cpp's default; a windowed layer's cache holds the window and one of these.
constexpr int64_t kMicroBatch = 512;

}  // namespace

ModelShape ReadCachedModelShape(const std::string& path) {
  ModelShape model = ReadModelShape(path);
  if (model.latent)
    throw Error(kRuntime, fmt::format("{}: {} keeps latent rows (MLA), which sparkv does not pack",
                                      path, model.architecture));
  if (Elements(model, 1) == 0)
    throw Error(kRuntime, fmt::format("{}: {} has no KV heads", path, model.architecture));
  return model;
}

RowBytes BytesPerHead(const Cache& cache, const ModelShape& model, size_t layer) {
  if (!cache.packed) {
    const double bits = HostBits(cache.name);
    return {model.key_length * bits / 8, model.value_length * bits / 8, 0.0};
  }
  sparkv_config rows = {};
  rows.struct_size = sizeof(rows);
  sparkv_error error = {};
  if (sparkv_config_layer(&cache.config, int32_t(layer), int32_t(model.layers.size()), &rows,
                          &error) != SPARKV_OK) {
    throw Error(kUsage, fmt::format("--kv-{}", error.text));
  }
  const bool weighted = rows.kept >= SPARKV_TIERS_7543 || int(rows.ratio * model.key_length) > 0;
  const RowBytes bytes = {double(sparkv_key_row_bytes(&rows, model.key_length)),
                          double(sparkv_value_row_bytes(&rows, model.value_length)),
                          weighted ? 2.0 * model.key_length : 0.0};
  if (bytes.key > 0 && bytes.value > 0) return bytes;
  throw Error(
      kRuntime,
      fmt::format(
          "key_length {}, value_length {}: sparkv packs heads of 32 to 512 channels in steps of 8",
          model.key_length, model.value_length));
}

int64_t CellsOf(const LayerShape& layer, const ModelShape& model, int64_t context) {
  if (!layer.windowed) return context;
  return std::min(context, (model.sliding_window + kMicroBatch + 255) / 256 * 256);
}

Cache SolveBudget(Cache cache, const ModelShape& model, int64_t context) {
  if (!cache.packed || cache.config.budget[0] == '\0') return cache;
  // Layers by their number of cells, as llama.cpp groups them.
  struct Group {
    std::vector<sparkv_layer_shape> layers;
    std::vector<int32_t> numbers;
  };
  std::map<int64_t, Group> groups;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (model.layers[i].kv_heads == 0) continue;
    Group& group = groups[CellsOf(model.layers[i], model, context)];
    group.layers.push_back({model.layers[i].kv_heads, model.key_length, model.value_length});
    group.numbers.push_back(int32_t(i));
  }
  std::vector<sparkv_shape> shapes;
  for (const auto& [cells, group] : groups) {
    sparkv_shape shape = {};
    shape.struct_size = sizeof(shape);
    shape.n_layers = int32_t(group.layers.size());
    shape.layers = group.layers.data();
    shape.cells_per_stream = cells;
    shape.n_streams = 1;
    shape.layer_numbers = group.numbers.data();
    shape.n_model_layers = int32_t(model.layers.size());
    shapes.push_back(shape);
  }
  sparkv_error error = {};
  if (sparkv_config_budget(&cache.config, shapes.data(), int32_t(shapes.size()), &cache.config,
                           &error) != SPARKV_OK) {
    throw Error(kUsage, fmt::format("--kv-{}", error.text));
  }
  return cache;
}

double PredictedBytes(const Cache& cache, const ModelShape& model, int64_t context) {
  const double dense = 2.0 * (model.key_length + model.value_length);
  double bytes = 0;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const LayerShape& layer = model.layers[i];
    const RowBytes packed = BytesPerHead(cache, model, i);
    const int64_t cells = CellsOf(layer, model, context);
    int64_t left = cells;
    const auto take = [&](int64_t most) {
      const int64_t taken = cache.packed ? std::min(left, most) : 0;
      left -= taken;
      return double(taken);
    };
    double head = take(int64_t(cache.config.sinks) + cache.config.window) * dense;
    const double table = left > 0 ? packed.weights : 0.0;
    int32_t before = cache.config.window, until = 0;
    sparkv_config rows = {};
    for (int32_t stage = 0; cache.packed && sparkv_config_recent(&cache.config, stage, &until,
                                                                 &rows, nullptr) == SPARKV_OK;
         ++stage) {
      head += take(until - before) *
              (std::max(packed.key, double(sparkv_key_row_bytes(&rows, model.key_length))) +
               std::max(packed.value, double(sparkv_value_row_bytes(&rows, model.value_length))));
      before = until;
    }
    bytes += layer.kv_heads * (head + double(left) * (packed.key + packed.value) + table);
  }
  return bytes;
}

void NoteEvictions(const std::vector<Cache>& caches) {
  for (const Cache& cache : caches) {
    if (!cache.Evicts()) continue;
    Note(fmt::format("{}: bytes of a whole prompt; heads evict down to {} tokens when it has ended",
                     cache.name, cache.config.evict_tokens));
  }
}

double Elements(const ModelShape& model, int64_t context) {
  double elements = 0;
  for (const LayerShape& layer : model.layers) {
    elements += double(CellsOf(layer, model, context)) * layer.kv_heads *
                (int64_t(model.key_length) + model.value_length);
  }
  return elements;
}

}  // namespace sparkv

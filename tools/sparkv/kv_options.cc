#include "kv_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>

#include "report.h"

namespace sparkv {
namespace {

struct Parameter {
  const char* name;  // as sparkv_config_set takes it
  const char* metavar;
  const char* help;
};

constexpr Parameter kParameters[] = {
    {"ratio", "R", "share of key channels pruned, 0 to 1"},
    {"recover", "zero|mean|paper", "how a pruned channel is restored"},
    {"group", "signed|energy", "how the query heads of a group become one channel weight"},
    {"kept", "f16|i8|i6|i5|i4|t7543|t7432|t6321|t5321|t4210", "number type of kept key channels"},
    {"values", "f16|q8|q4|t4|t3|t2|t1", "number type of value rows"},
    {"sinks", "N", "first tokens of a sequence that stay dense"},
    {"window", "N", "newest tokens of a sequence that stay dense"},
    {"observe", "N", "differing tokens whose queries make the weights"},
    {"seal", "stream|prefill-end", "when tokens are packed"},
    {"simd", "auto|plain|avx2|avx512|amx|neon", "instruction set of the kernels"},
    {"threads", "N", "threads of the kernels, 0: as many as the host uses"},
    {"layers", "LIST", "layers of their own: 0-1=spark-0-i8,middle=tiers-6321; none"},
    {"budget", "4bpe|512MiB|auto", "what the whole cache may take; chooses the rows of each layer"},
    {"sensitivity", "LIST", "what a budget takes from which layer: 0-4:0.5,15-19:7.1"},
    {"recent", "LIST", "rows between window and packed ones: 256:i8+q8,1024:t7432+t4"},
    {"calibration", "FILE", "what `sparkv calibrate` wrote for this model"},
    {"evict", "METHOD:TOKENS", "tokens a head keeps of a prompt: snapkv:512"},
    {"protect", "first:N,last:N", "first and last layers that keep 8-bit numbers, none pruned"},
};

struct HostType {
  const char* name;
  double bits;
};

constexpr HostType kHostTypes[] = {{"f32", 32},   {"f16", 16},   {"bf16", 16},
                                   {"q8_0", 8.5}, {"q5_1", 6},   {"q5_0", 5.5},
                                   {"q4_1", 5},   {"q4_0", 4.5}, {"iq4_nl", 4.5}};

const HostType* FindHostType(const std::string& name) {
  const auto* found = std::find_if(std::begin(kHostTypes), std::end(kHostTypes),
                                   [&](const HostType& type) { return name == type.name; });
  return found == std::end(kHostTypes) ? nullptr : found;
}

// The types of keys and of values in "q8_0/q4_0"; in "q8_0" both are the same.
std::pair<std::string, std::string> KeysAndValues(const std::string& name) {
  const size_t slash = name.find('/');
  return {name.substr(0, slash), slash == std::string::npos ? name : name.substr(slash + 1)};
}

bool IsHostCache(const std::string& name) {
  const auto [keys, values] = KeysAndValues(name);
  return FindHostType(keys) && FindHostType(values);
}

// The library names the field; the user typed an option.
[[noreturn]] void Refuse(const std::string& field, const char* text) {
  std::string reason = text;
  if (reason.rfind(field + ": ", 0) == 0) reason.erase(0, field.size() + 2);
  throw Error(kUsage, fmt::format("--kv-{}: {}", field, reason));
}

// The parts between commas; none may be empty.
std::vector<std::string> SplitList(const std::string& option, const std::string& list) {
  std::vector<std::string> parts;
  for (size_t start = 0; start <= list.size();) {
    const size_t end = std::min(list.find(',', start), list.size());
    if (end == start) throw Error(kUsage, fmt::format("{}: '{}' has an empty part", option, list));
    parts.push_back(list.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

// Comes last: it fills in what the other options leave open.
void Calibrate(const std::string& path, Cache* cache) {
  std::string bytes;
  try {
    bytes = ReadFile(path);
  } catch (const Error& error) {
    throw Error(kUsage, fmt::format("--kv-calibration: {}", error.what()));
  }
  sparkv_error error = {};
  char model[128] = "";
  if (sparkv_calibration_model(bytes.data(), bytes.size(), model, &error) != SPARKV_OK ||
      sparkv_config_calibration(&cache->config, bytes.data(), bytes.size(), &error) != SPARKV_OK) {
    throw Error(kUsage, fmt::format("--kv-calibration: {}: {}", path, error.text));
  }
  cache->calibrated_for = model;
}

// The plugin's variable of the same name counts where the option is not given.
std::string VariableOf(std::string key) {
  std::transform(key.begin(), key.end(), key.begin(), [](unsigned char c) { return toupper(c); });
  return "SPARKV_" + key;
}

// A codec of others, for comparison: the plugin codes and decodes rows and stores them dense. What
// stays dense and when rows are packed is as for the presets without recent rows.
Cache MakeCodec(const std::string& name, const KvOptions& options) {
  KvOptions same;
  same.values["window"] = fmt::format("{}", MakeCache("spark-0.5-i5", {}).config.window);
  for (const char* key : {"sinks", "window", "observe", "seal", "simd", "threads"}) {
    if (options.values.count(key) != 0) same.values[key] = options.values.at(key);
  }
  Cache cache = MakeCache("exact", same);
  cache.name = name;
  sparkv_error error = {};
  if (sparkv_config_set(&cache.config, "baseline", name.c_str(), &error) != SPARKV_OK) {
    throw Error(kUsage,
                fmt::format("--baselines: '{}' is neither a cache type of llama.cpp nor a codec "
                            "(kivi-2, turboquant-3, think-0.5, q4_0-rows, ...)",
                            name));
  }
  cache.environment.push_back("SPARKV_BASELINE=" + name);
  return cache;
}

}  // namespace

void AddKvOptions(CLI::App* app, KvOptions* options) {
  const std::string group = "Packed cache";
  app->add_option("--kv-preset", options->preset,
                  "the default is balanced; also spark-R or spark-R-iB for any R and B tiers-7543, "
                  "-7432, -6321, -5321, -4210; f16: llama.cpp without sparkv; balanced+snapkv:512: "
                  "with an eviction of its own")
      ->type_name("safe|balanced|small|tiny|exact|spark-0.8|spark-0.5-i5|f16")
      ->envname(VariableOf("preset"))
      ->group(group);
  for (const Parameter& parameter : kParameters) {
    app->add_option_function<std::string>(
           fmt::format("--kv-{}", parameter.name),
           [options, name = parameter.name](const std::string& text) {
             options->values[name] = text;
           },
           parameter.help)
        ->type_name(parameter.metavar)
        ->envname(VariableOf(parameter.name))
        ->group(group);
  }
}

std::vector<std::string> Cache::Flags() const {
  if (packed) return {"-dev", "SPARKV", "-ngl", "99", "-fa", "on"};
  const auto [keys, values] = KeysAndValues(name);
  return {"-dev", "none", "-fa", "on", "-ctk", keys, "-ctv", values};
}

Cache MakeCache(const std::string& name, const KvOptions& given) {
  Cache cache;
  cache.name = name;
  if (IsHostCache(name)) {
    const auto [keys, values] = KeysAndValues(name);
    if (keys == values) cache.name = keys;
    return cache;
  }
  const size_t plus = name.find('+');
  KvOptions options = given;
  if (plus != std::string::npos) options.values["evict"] = name.substr(plus + 1);
  cache.packed = true;
  cache.config.struct_size = sizeof(cache.config);
  sparkv_error error = {};
  if (sparkv_config_preset(&cache.config, name.substr(0, plus).c_str(), &error) != SPARKV_OK)
    Refuse("preset", error.text);
  cache.environment.push_back(std::string("SPARKV_PRESET=") + cache.config.preset);
  cache.name = cache.config.preset;
  if (plus != std::string::npos) cache.name += name.substr(plus);
  for (const auto& [key, value] : options.values) {
    if (key == "calibration") continue;
    if (sparkv_config_set(&cache.config, key.c_str(), value.c_str(), &error) != SPARKV_OK)
      Refuse(key, error.text);
    cache.environment.push_back(VariableOf(key) + "=" + value);
  }
  if (const auto file = options.values.find("calibration"); file != options.values.end()) {
    Calibrate(file->second, &cache);
    cache.environment.push_back("SPARKV_CALIBRATION=" +
                                std::filesystem::absolute(file->second).string());
  }
  return cache;
}

std::string ModelName(const ModelShape& shape) {
  return Printable(shape.architecture + " " + shape.name).substr(0, 127);
}

void CheckCalibration(const Cache& cache, const ModelShape& shape) {
  if (cache.calibrated_for.empty() || cache.calibrated_for == ModelName(shape)) return;
  throw Error(kUsage, fmt::format("--kv-calibration: made for '{}', this model is '{}'",
                                  Printable(cache.calibrated_for), ModelName(shape)));
}

std::vector<Cache> MakeCaches(const std::string& baselines, const KvOptions& options, bool codecs) {
  std::vector<Cache> caches;
  const auto add = [&](Cache cache) {
    const bool known = std::any_of(caches.begin(), caches.end(),
                                   [&](const Cache& other) { return other.name == cache.name; });
    if (!known) caches.push_back(std::move(cache));
  };
  for (const auto& name : SplitList("--baselines", baselines)) {
    if (!IsHostCache(name) && !codecs)
      throw Error(kUsage, fmt::format("--baselines: '{}' is not a cache type of llama.cpp", name));
    add(IsHostCache(name) ? MakeCache(name, {}) : MakeCodec(name, options));
  }
  if (options.preset.empty())
    add(MakeCache("", options));
  else
    for (const auto& name : SplitList("--kv-preset", options.preset)) add(MakeCache(name, options));
  return caches;
}

double HostBits(const std::string& name) {
  if (!IsHostCache(name)) return 0;
  const auto [keys, values] = KeysAndValues(name);
  return (FindHostType(keys)->bits + FindHostType(values)->bits) / 2;
}

}  // namespace sparkv

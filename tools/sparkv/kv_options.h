// The --kv-* options, and the caches that a command compares.
#ifndef SPARKV_TOOLS_KV_OPTIONS_H_
#define SPARKV_TOOLS_KV_OPTIONS_H_

#include <CLI/CLI.hpp>
#include <map>
#include <string>
#include <vector>

#include "gguf.h"
#include "sparkv/sparkv.h"

namespace sparkv {

struct KvOptions {
  std::string preset;                         // as typed; may be a list where a command compares
  std::map<std::string, std::string> values;  // parameter name -> text, only those given
};

void AddKvOptions(CLI::App* app, KvOptions* options);

// One way to keep the cache: a type of llama.cpp's own (f16, q8_0, q4_0, ..., or q8_0/q4_0 for keys
// and values apart) or a sparkv preset, alone or with an eviction of its own: balanced+snapkv:512.
struct Cache {
  std::string name;
  bool packed = false;                     // needs the plugin
  sparkv_config config = {};               // when packed
  std::vector<std::string> environment;    // "SPARKV_...=...", when packed
  std::string calibrated_for;              // the model of --kv-calibration; empty: any
  std::vector<std::string> Flags() const;  // for any llama.cpp program
  bool Evicts() const { return packed && config.evict != SPARKV_EVICT_NONE; }
};

// As a calibration names a model, from its file.
std::string ModelName(const ModelShape& shape);
// Throws Error(kUsage) when the cache is calibrated for another model than this file.
void CheckCalibration(const Cache& cache, const ModelShape& shape);

// Checks preset and parameters; throws Error(kUsage) naming the option and the value.
Cache MakeCache(const std::string& name, const KvOptions& options);
// What bench and eval compare: `baselines`, a list of llama.cpp's types and, with `codecs`, of
// codecs of others, then the presets of `options`, each once.
std::vector<Cache> MakeCaches(const std::string& baselines, const KvOptions& options,
                              bool codecs = false);
// Stored bits per element of llama.cpp's own types, by their block layout; 0 for other caches. Keys
// and values count alike.
double HostBits(const std::string& name);

}  // namespace sparkv

#endif

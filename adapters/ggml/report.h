// What a cache cost, as a line, as JSON and as picture data; and files that are never torn.
#pragma once

#include <string>
#include <vector>

#include "options.h"

namespace sparkv {

// What the heads of a layer lose (sparkv_cache_errors).
struct LayerErrors {
  int layer = 0;
  std::vector<double> keys, values;
};

// One KV cache at the moment of its most live tokens.
struct CacheReport {
  sparkv_memory memory = {};
  int n_layers = 0;
  std::string budget_layers;        // what a budget chose
  int64_t key_elements = 0;         // per token, all layers
  int64_t value_elements = 0;       // per token, all layers
  std::vector<LayerErrors> errors;  // SPARKV_ERRORS
};

CacheReport MakeReport(const sparkv_cache* cache, const std::vector<sparkv_layer_shape>& layers,
                       const std::string& budget_layers);
LayerErrors ErrorsOf(const sparkv_cache* cache, int index, int layer, int n_kv_heads);
std::string ReportLine(const CacheReport& report);
std::string StatsJson(const Options& options, const std::string& isa,
                      const std::vector<CacheReport>& reports);
// Picture data of one head of `layer`.
std::string SaliencyJson(sparkv_cache* cache, int layer, int head, int head_dim);

// The old file or the new one, whatever happens; a device or a pipe is written in place. False
// after logging why.
bool WriteFile(const std::string& path, const std::string& bytes);
// False when the file does not exist or cannot be read; *reason is only set where it exists.
bool ReadFile(const std::string& path, std::string* bytes, std::string* reason);
// False where a file is there, is not empty and begins with something else than `magic`.
bool MayReplace(const std::string& path, const std::string& magic);

}  // namespace sparkv

// What single heads of a packed cache lose, as eval keeps it and report draws it.
#ifndef SPARKV_TOOLS_HEADS_H_
#define SPARKV_TOOLS_HEADS_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sparkv {

struct LayerErrors {
  int layer = 0;
  std::vector<double> keys, values;  // by KV head
};

// "errors" of all caches that the plugin reports on, by layer; null where there are none.
nlohmann::json ErrorsOfStats(const nlohmann::json& stats);
// The first tokens of picture data of SPARKV_SALIENCY; null where it is none.
nlohmann::json FirstTokens(const nlohmann::json& picture, size_t tokens);

// `field` names it in errors (Error, kUsage): a list as ErrorsOfStats gives it.
std::vector<LayerErrors> ReadErrors(const nlohmann::json& errors, const std::string& field);
// Keys and values, layers from left to right and heads from top to bottom; the darkest is `most`.
std::string DrawErrors(const std::string& title, const std::vector<LayerErrors>& errors,
                       double most_keys, double most_values);

}  // namespace sparkv

#endif

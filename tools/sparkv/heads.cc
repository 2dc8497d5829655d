#include "heads.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "report.h"
#include "svg.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

constexpr size_t kMostLayers = 4096, kMostHeads = 1024;
constexpr double kWidth = 880, kLeft = 70, kTop = 58, kBetween = 52;
constexpr std::array<const char*, 8> kShades = {"#eef3fa", "#d3e1f3", "#aecbe9", "#85b0dc",
                                                "#5c92cb", "#3a74b4", "#235695", "#123668"};

std::vector<double> Numbers(const Json& layer, const char* name, const std::string& field) {
  const auto found = layer.find(name);
  if (found == layer.end() || !found->is_array() || found->size() > kMostHeads)
    throw Error(kUsage, fmt::format("{}/{}: is no list of heads", field, name));
  std::vector<double> numbers;
  for (const Json& number : *found) {
    if (!number.is_number() || !(number.get<double>() >= 0 && number.get<double>() < 1e6))
      throw Error(kUsage, fmt::format("{}/{}: holds something else than errors", field, name));
    numbers.push_back(number);
  }
  return numbers;
}

}  // namespace

Json ErrorsOfStats(const Json& stats) {
  Json all = Json::array();
  for (const Json& cache : stats.value("caches", Json::array())) {
    for (const Json& layer : cache.value("errors", Json::array())) all.push_back(layer);
  }
  std::stable_sort(all.begin(), all.end(), [](const Json& a, const Json& b) {
    return a.value("layer", 0) < b.value("layer", 0);
  });
  return all.empty() ? Json() : all;
}

Json FirstTokens(const Json& picture, size_t tokens) {
  if (!picture.is_object()) return nullptr;
  Json first = picture;
  for (const char* field : {"kept", "saliency"}) {
    Json& rows = first[field];
    if (!rows.is_array() || rows.empty()) return nullptr;
    if (rows.size() > tokens) rows.erase(rows.begin() + long(tokens), rows.end());
    first["tokens"] = rows.size();
  }
  return first;
}

std::vector<LayerErrors> ReadErrors(const Json& errors, const std::string& field) {
  if (!errors.is_array() || errors.size() > kMostLayers)
    throw Error(kUsage, fmt::format("{}: is no list of layers", field));
  std::vector<LayerErrors> out;
  for (size_t i = 0; i < errors.size(); ++i) {
    const std::string at = fmt::format("{}/{}", field, i);
    const Json& layer = errors[i];
    if (!layer.is_object() || !layer.contains("layer") || !layer["layer"].is_number_unsigned() ||
        layer["layer"].get<uint64_t>() >= uint64_t{1} << 16)
      throw Error(kUsage, fmt::format("{}/layer: is no layer", at));
    out.push_back({layer["layer"], Numbers(layer, "keys", at), Numbers(layer, "values", at)});
  }
  return out;
}

std::string DrawErrors(const std::string& title, const std::vector<LayerErrors>& errors,
                       double most_keys, double most_values) {
  size_t heads = 1;
  for (const LayerErrors& layer : errors)
    heads = std::max({heads, layer.keys.size(), layer.values.size()});
  const double column = (kWidth - kLeft - 20) / double(std::max<size_t>(errors.size(), 1));
  const double row = std::clamp(120.0 / double(heads), 3.0, 18.0), panel = row * double(heads);
  const double height = kTop + 2 * panel + kBetween + 34;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1:.0f}\" font-family="
      "\"system-ui, sans-serif\" font-size=\"12\" fill=\"#333a44\">\n",
      kWidth, height);
  out += SvgText(kLeft, 20, title, "font-size=\"15\" font-weight=\"600\"");
  for (const bool keys : {true, false}) {
    const double y = kTop + (keys ? 0 : panel + kBetween), most = keys ? most_keys : most_values;
    out += SvgText(kLeft, y - 8,
                   fmt::format("{}: {}, white 0, darkest {:.3f}", keys ? "keys" : "values",
                               keys ? "error of q . k over q . k" : "error over length", most));
    out += SvgText(kLeft - 8, y + panel / 2 + 4, heads == 1 ? "head 0" : "heads",
                   "text-anchor=\"end\"");
    for (size_t i = 0; i < errors.size(); ++i) {
      const std::vector<double>& list = keys ? errors[i].keys : errors[i].values;
      for (size_t h = 0; h < list.size(); ++h) {
        const double share = most > 0 ? list[h] / most : 0;
        out += fmt::format(
            "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"{}\">"
            "<title>layer {}, head {}: {:.4f}</title></rect>\n",
            kLeft + column * double(i), y + row * double(h), column, row,
            kShades[std::min<size_t>(size_t(share * double(kShades.size())), kShades.size() - 1)],
            errors[i].layer, h, list[h]);
      }
    }
  }
  const double y = kTop + 2 * panel + kBetween + 16;
  for (size_t i = 0; i < errors.size(); i += std::max<size_t>(1, errors.size() / 10)) {
    out += SvgText(kLeft + column * (double(i) + 0.5), y,
                   fmt::format("{}{}", i == 0 ? "layer " : "", errors[i].layer),
                   "text-anchor=\"middle\"");
  }
  return out + "</svg>\n";
}

}  // namespace sparkv

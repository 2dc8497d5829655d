#include "saliency.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "report.h"
#include "svg.h"

namespace sparkv {
namespace {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxTokens = 1 << 22;
constexpr int kLeft = 52, kWidth = 960;  // of both panels, in pixels
constexpr int kOverviewColumns = 480;    // bins of tokens in the overview
constexpr int kZoomTokens = 160;
constexpr int kShades = 8;

// Light to dark; kept channels and the kept share.
constexpr std::array<const char*, kShades> kBlue = {"#dbe7f6", "#bdd4ee", "#99bce3", "#73a1d6",
                                                    "#4f86c6", "#336bb0", "#215294", "#143a70"};
// Pruned channels: paler, so that the kept ones lead.
constexpr std::array<const char*, kShades> kSand = {"#fbf6ee", "#f7ecdc", "#f3e1c6", "#eed4ac",
                                                    "#e8c590", "#e1b473", "#d8a257", "#cd8f3d"};

struct Head {
  int layer = 0, head = 0, head_dim = 0, tokens = 0;
  std::vector<uint8_t> kept;      // [tokens][head_dim], 0 or 1
  std::vector<uint8_t> saliency;  // [tokens][head_dim]

  bool Dense(int t) const {
    return std::all_of(&kept[size_t(t) * head_dim], &kept[size_t(t) * head_dim] + head_dim,
                       [](uint8_t k) { return k; });
  }
};

std::vector<uint8_t> FromHex(const std::string& hex, size_t bytes, const std::string& field) {
  if (hex.size() != 2 * bytes) {
    throw Error(kRuntime,
                fmt::format("{}: {} hex digits, {} expected", field, hex.size(), 2 * bytes));
  }
  const auto digit = [&](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    throw Error(kRuntime, fmt::format("{}: '{}' is not a hex digit", field, c));
  };
  std::vector<uint8_t> out(bytes);
  for (size_t i = 0; i < bytes; ++i) out[i] = digit(hex[2 * i]) * 16 + digit(hex[2 * i + 1]);
  return out;
}

int Integer(const nlohmann::json& json, const std::string& source, const char* field, int least,
            int most) {
  const auto found = json.find(field);
  if (found == json.end() || !found->is_number_integer()) {
    throw Error(kRuntime, fmt::format("{}: {}: is missing or not an integer", source, field));
  }
  const auto value = found->get<int64_t>();
  if (value < least || value > most) {
    throw Error(kRuntime,
                fmt::format("{}: {}: {} is outside {}..{}", source, field, value, least, most));
  }
  return static_cast<int>(value);
}

const nlohmann::json& Rows(const nlohmann::json& json, const std::string& source, const char* field,
                           int tokens) {
  const auto found = json.find(field);
  if (found == json.end() || !found->is_array() || found->size() != size_t(tokens) ||
      !std::all_of(found->begin(), found->end(), [](const auto& row) { return row.is_string(); })) {
    throw Error(kRuntime,
                fmt::format("{}: {}: is not an array of {} strings", source, field, tokens));
  }
  return *found;
}

Head Parse(const std::string& text, const std::string& source) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object()) throw Error(kRuntime, fmt::format("{}: not a JSON object", source));
  Head head;
  head.layer = Integer(json, source, "layer", 0, 1 << 16);
  head.head = Integer(json, source, "head", 0, 1 << 16);
  head.head_dim = Integer(json, source, "head_dim", 8, kMaxHeadDim);
  head.tokens = Integer(json, source, "tokens", 1, kMaxTokens);
  const auto& kept = Rows(json, source, "kept", head.tokens);
  const auto& saliency = Rows(json, source, "saliency", head.tokens);
  for (int t = 0; t < head.tokens; ++t) {
    const auto bits = FromHex(kept[t].get_ref<const std::string&>(), (head.head_dim + 7) / 8,
                              fmt::format("{}: kept[{}]", source, t));
    for (int c = 0; c < head.head_dim; ++c) head.kept.push_back(bits[c / 8] >> (c % 8) & 1);
    const auto row = FromHex(saliency[t].get_ref<const std::string&>(), head.head_dim,
                             fmt::format("{}: saliency[{}]", source, t));
    head.saliency.insert(head.saliency.end(), row.begin(), row.end());
  }
  return head;
}

// Cells of one colour become one path; neighbours in a row become one rectangle.
class Cells {
 public:
  Cells(int columns, int rows) : columns_(columns), colour_(size_t(columns) * rows, nullptr) {}
  void Set(int column, int row, const char* colour) {
    colour_[size_t(row) * columns_ + column] = colour;
  }

  std::string Draw(double x, double y, double width, double height) const {
    const int rows = static_cast<int>(colour_.size()) / columns_;
    std::vector<std::pair<const char*, std::string>> paths;
    for (int r = 0; r < rows; ++r) {
      for (int c = 0, end; c < columns_; c = end) {
        const char* colour = colour_[size_t(r) * columns_ + c];
        for (end = c + 1; end < columns_ && colour_[size_t(r) * columns_ + end] == colour;) ++end;
        if (!colour) continue;
        auto path = std::find_if(paths.begin(), paths.end(),
                                 [&](const auto& p) { return p.first == colour; });
        if (path == paths.end()) path = paths.insert(paths.end(), {colour, ""});
        path->second += fmt::format("M{} {}h{}v1H{}z", c, r, end - c, c);
      }
    }
    std::string out = fmt::format(
        "<g transform=\"translate({:.3f} {:.3f}) scale({:.5f} {:.5f})\" "
        "shape-rendering=\"crispEdges\">",
        x, y, width / columns_, height / rows);
    for (const auto& [colour, path] : paths)
      out += fmt::format("<path fill=\"{}\" d=\"{}\"/>", colour, path);
    return out + "</g>\n";
  }

 private:
  int columns_;
  std::vector<const char*> colour_;  // [rows][columns_]
};

std::string Frame(double y, double height) {
  return fmt::format(
      "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"none\" stroke=\"#8a93a0\" "
      "stroke-width=\"0.8\"/>\n",
      kLeft, y, kWidth, height);
}

std::string ChannelAxis(double y, double height, int head_dim) {
  const double middle = y + height / 2;
  return SvgText(kLeft - 8, y + 10, "0", "text-anchor=\"end\"") +
         SvgText(kLeft - 8, y + height - 2, fmt::format("{}", head_dim - 1),
                 "text-anchor=\"end\"") +
         SvgText(kLeft - 14, middle, "channel",
                 fmt::format("text-anchor=\"middle\" transform=\"rotate(-90 {} {})\"", kLeft - 14,
                             middle)
                     .c_str());
}

std::string TokenAxis(double y, int first, int last) {
  std::string out;
  constexpr int kTicks = 4;
  for (int i = 0; i <= kTicks; ++i) {
    const double x = kLeft + double(kWidth) * i / kTicks;
    const char* anchor = i == 0 ? "start" : i == kTicks ? "end" : "middle";
    out += SvgText(
        x, y,
        fmt::format("{}{}", i == 0 ? "token " : "", first + (last - first) * int64_t(i) / kTicks),
        fmt::format("text-anchor=\"{}\"", anchor).c_str());
  }
  return out;
}

int Shade(double share) { return std::clamp(static_cast<int>(share * kShades), 0, kShades - 1); }

std::string Legend(double x, double y, const std::array<const char*, kShades>& colours,
                   const std::string& label) {
  std::string out;
  for (int i = 0; i < kShades; ++i) {
    out += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"12\" height=\"10\" fill=\"{}\"/>",
                       x + 12 * i, y - 9, colours[i]);
  }
  return out + SvgText(x + 12 * kShades + 6, y, label);
}

std::string Overview(const Head& head, double y, double height) {
  const int columns = std::min(head.tokens, kOverviewColumns);
  Cells cells(columns, head.head_dim);
  for (int c = 0; c < columns; ++c) {
    const int first = int64_t(head.tokens) * c / columns;
    const int end = int64_t(head.tokens) * (c + 1) / columns;
    for (int j = 0; j < head.head_dim; ++j) {
      int kept = 0;
      for (int t = first; t < end; ++t) kept += head.kept[size_t(t) * head.head_dim + j];
      cells.Set(c, j, kBlue[Shade(double(kept) / (end - first))]);
    }
  }
  return cells.Draw(kLeft, y, kWidth, height);
}

std::string Zoom(const Head& head, int first, int count, double y, double height) {
  Cells cells(count, head.head_dim);
  for (int t = 0; t < count; ++t) {
    for (int j = 0; j < head.head_dim; ++j) {
      const size_t at = size_t(first + t) * head.head_dim + j;
      // Square root: most saliencies are far below the largest of their row.
      const int shade = Shade(std::sqrt(head.saliency[at] / 255.0));
      cells.Set(t, j, head.kept[at] ? kBlue[shade] : kSand[shade]);
    }
  }
  return cells.Draw(kLeft, y, kWidth, height);
}

}  // namespace

std::string DrawSaliency(const std::string& json, const std::string& source) {
  const Head head = Parse(json, source);
  const double cell = std::max(1.0, 192.0 / head.head_dim);
  const double height = cell * head.head_dim;
  const double overview = 78, zoom = overview + height + 84;
  const double total = zoom + height + 58;
  const int count = std::min(head.tokens, kZoomTokens);
  const int first = std::max(0, std::min(head.tokens / 10, head.tokens - count));

  int dense = 0;
  int64_t kept = 0;
  for (int t = 0; t < head.tokens; ++t) {
    if (head.Dense(t)) {
      ++dense;
    } else {
      kept += std::count(&head.kept[size_t(t) * head.head_dim],
                         &head.kept[size_t(t) * head.head_dim] + head.head_dim, 1);
    }
  }
  const int packed = head.tokens - dense;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1:.0f}\" width=\"{0}\" "
      "height=\"{1:.0f}\" "
      "font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#333a44\">\n<rect "
      "width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
      kLeft + kWidth + 20, total);
  out += SvgText(kLeft, 22, fmt::format("Keys of layer {}, KV head {}", head.layer, head.head),
                 "font-size=\"16\" font-weight=\"600\"");
  out += SvgText(
      kLeft, 42,
      packed == 0
          ? fmt::format("{} tokens x {} channels, none pruned", head.tokens, head.head_dim)
          : fmt::format("{} tokens x {} channels; {} tokens dense (sinks and window), {} packed "
                        "with {:.1f} channels kept each",
                        head.tokens, head.head_dim, dense, packed, double(kept) / packed));
  out += SvgText(kLeft, overview - 6, "All tokens", "font-weight=\"600\"");
  out += Legend(kLeft + kWidth - 262, overview - 6, kBlue, "share of tokens that keep it");
  out += Overview(head, overview, height) + Frame(overview, height) +
         ChannelAxis(overview, height, head.head_dim);
  out += TokenAxis(overview + height + 16, 0, head.tokens - 1);

  out += SvgText(kLeft, zoom - 26, fmt::format("Tokens {} to {}", first, first + count - 1),
                 "font-weight=\"600\"");
  out += Legend(kLeft, zoom - 6, kBlue, "kept, darker = more salient");
  out += Legend(kLeft + 320, zoom - 6, kSand, "pruned, darker = more salient");
  out += Zoom(head, first, count, zoom, height) + Frame(zoom, height) +
         ChannelAxis(zoom, height, head.head_dim);
  out += TokenAxis(zoom + height + 16, first, first + count - 1);
  out += SvgText(kLeft, total - 12,
                 "Saliency = |key| x channel weight of the queries, scaled to the largest of its "
                 "token, square root.");
  return out + "</svg>\n";
}

std::string SaliencyPage(const std::string& svg) {
  return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>sparkv: "
         "saliency</title>\n"
         "<style>body{margin:2rem "
         "auto;max-width:1040px}svg{width:100%;height:auto}</style></head><body>\n" +
         svg + "</body></html>\n";
}

}  // namespace sparkv

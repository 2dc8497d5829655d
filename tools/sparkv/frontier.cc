#include "frontier.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "child.h"
#include "heads.h"
#include "kv_options.h"
#include "launch.h"
#include "report.h"
#include "saliency.h"
#include "svg.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

constexpr double kWidth = 880, kHeight = 400, kLeft = 70, kRight = 130, kTop = 40, kBottom = 50;
constexpr const char* kBlue = "#1f6fb2";  // ours
constexpr const char* kSand = "#b5793a";  // llama.cpp's own
constexpr double kLeastKl = 1e-7;         // what is drawn for none

struct Settings {
  std::string results, page, csv, png;
};

struct Column {
  const char* field;
  const char* header;
  int digits;
};
constexpr Column kColumns[] = {{"bits_per_element", "bits per element", 3},
                               {"mean_kld", "mean KL", 6},
                               {"median_kld", "median KL", 6},
                               {"kld_99", "99 % KL", 5},
                               {"perplexity_ratio", "perplexity x", 4},
                               {"top1_agreement", "same top token", 4}};

// One cache of an evaluation.
struct Row {
  std::string cache;
  bool ours = false;
  double numbers[std::size(kColumns)] = {};
  std::vector<std::pair<int, int>> tasks;  // right, asked
  std::vector<LayerErrors> errors;         // of a packed cache
  std::string saliency;                    // picture of one of its heads, ""

  double bits() const { return numbers[0]; }
  double kl() const { return std::max(numbers[1], kLeastKl); }
  double right() const {
    int right = 0, asked = 0;
    for (const auto& [r, a] : tasks) right += r, asked += a;
    return asked == 0 ? 0.0 : double(right) / asked;
  }
};

struct Evaluation {
  std::string model, text, weights, ask = "after";
  double context = 0, floor = 0;
  std::vector<std::string> tasks;
  std::vector<Row> rows;
};

// The evaluation in a file that anyone may have written.
class Reader {
  static constexpr int kDepth = 16;
  static constexpr const char* kLetters = "abcdefghijklmnopqrstuvwxyz";

 public:
  explicit Reader(std::string source) : source_(std::move(source)) {}

  Evaluation Read() const {
    // Deeper than any evaluation: copies and text of such a value would take the stack.
    bool deep = false;
    const auto level = [&](int depth, Json::parse_event_t, Json&) {
      deep |= depth > kDepth;
      return depth <= kDepth;
    };
    const Json json = Json::parse(ReadFile(source_), level, false);
    if (deep) throw Error(kUsage, fmt::format("{}: nested too deeply", source_));
    if (!json.is_object()) throw Error(kUsage, fmt::format("{}: not a JSON object", source_));
    Evaluation out;
    out.model = String(json, "/model");
    out.text = String(json, "/text");
    out.weights = String(json, "/weights");
    if (json.contains("ask")) out.ask = String(json, "/ask");
    out.context = Number(json, "/context");
    out.floor = Number(json, "/noise_floor/flash_attention");
    for (const Json& task : Array(json, "/tasks")) {
      if (!task.is_string() ||
          task.get<std::string>().find_first_not_of(kLetters) != std::string::npos)
        Refuse("/tasks", "holds something else than names");
      out.tasks.push_back(task);
    }
    const Json& rows = Array(json, "/results");
    if (rows.empty()) Refuse("/results", "is empty");
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string at = fmt::format("/results/{}", i);
      Row row;
      row.cache = String(json, at + "/cache");
      row.ours = MakesPacked(row.cache);
      for (size_t c = 0; c < std::size(kColumns); ++c)
        row.numbers[c] = Number(json, at + "/" + kColumns[c].field);
      if (!(row.bits() > 0 && row.bits() <= 64))
        Refuse(at + "/bits_per_element", "is not in 0..64");
      for (const auto& task : out.tasks) {
        const double right = Number(json, at + "/tasks/" + task + "/right"),
                     asked = Number(json, at + "/tasks/" + task + "/asked");
        if (!(right >= 0 && right <= asked && asked <= 1e6))
          Refuse(at + "/tasks/" + task, "is odd");
        row.tasks.emplace_back(int(right), int(asked));
      }
      // Of a packed cache, and not of a file that is older than that.
      if (const Json& result = rows[i]; !result.value("errors", Json()).is_null())
        row.errors = ReadErrors(result["errors"], source_ + ": " + at + "/errors");
      if (const Json picture = rows[i].value("saliency", Json()); !picture.is_null())
        row.saliency = Picture(picture, at + "/saliency");
      out.rows.push_back(row);
    }
    return out;
  }

 private:
  [[noreturn]] void Refuse(const std::string& field, const char* why) const {
    throw Error(kUsage, fmt::format("{}: {} {}; is it what 'sparkv eval --json' wrote?", source_,
                                    Printable(field), why));
  }
  const Json& Field(const Json& json, const std::string& pointer) const {
    const Json::json_pointer at(pointer);
    if (!json.contains(at)) Refuse(pointer, "is missing");
    return json.at(at);
  }
  std::string String(const Json& json, const std::string& pointer) const {
    const Json& field = Field(json, pointer);
    if (!field.is_string()) Refuse(pointer, "is no text");
    return Printable(field);
  }
  double Number(const Json& json, const std::string& pointer) const {
    const Json& field = Field(json, pointer);
    if (field.is_null()) return std::nan("");  // of a model that breaks
    if (!field.is_number()) Refuse(pointer, "is no number");
    return field;
  }
  const Json& Array(const Json& json, const std::string& pointer) const {
    const Json& field = Field(json, pointer);
    if (!field.is_array()) Refuse(pointer, "is no list");
    return field;
  }
  std::string Picture(const Json& picture, const std::string& at) const {
    try {
      return DrawSaliency(picture.dump(), fmt::format("{}: {}", source_, at));
    } catch (const Error& e) {
      throw Error(kUsage, Printable(e.what()));
    }
  }
  static bool MakesPacked(const std::string& name) {
    try {
      return MakeCache(name, {}).packed;
    } catch (const Error&) {
      return false;  // of another version
    }
  }

  std::string source_;
};

// Bits from left to right; `up` in 0..1 says how high.
template <typename Up>
std::string Plot(const Evaluation& e, const std::string& title,
                 const std::vector<std::pair<double, std::string>>& marks, const Up& up) {
  double most = 0;
  for (const Row& row : e.rows) most = std::max(most, row.bits());
  most = std::ceil(most / 2) * 2;
  const double width = kWidth - kLeft - kRight, height = kHeight - kTop - kBottom;
  const auto x = [&](double bits) { return kLeft + width * bits / most; };
  const auto y = [&](double share) { return kTop + height * (1 - share); };
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" "
      "font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#333a44\">\n",
      kWidth, kHeight);
  out += SvgText(kLeft, 20, title, "font-size=\"15\" font-weight=\"600\"");
  const double step = most > 8 ? 2 : 1;
  for (double bits = 0; bits <= most; bits += step) {
    out += SvgText(x(bits), kHeight - kBottom + 18, fmt::format("{:g}", bits),
                   "text-anchor=\"middle\"");
  }
  out += SvgText(kLeft + width / 2, kHeight - 10,
                 "bits per element of keys and values, all counted", "text-anchor=\"middle\"");
  for (const auto& [share, label] : marks) {
    out += fmt::format(
        "<line x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\" stroke=\"#dde1e6\"/>\n", kLeft,
        kLeft + width, y(share));
    out += SvgText(kLeft - 8, y(share) + 4, label, "text-anchor=\"end\"");
  }
  for (const Row& row : e.rows) {
    const double at = x(row.bits()), height_at = y(up(row));
    if (!std::isfinite(height_at)) continue;
    out += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"5\" fill=\"{}\"/>\n", at, height_at,
                       row.ours ? kBlue : kSand);
    out += SvgText(at + 8, height_at + 4, row.cache);
  }
  return out + "</svg>\n";
}

std::string KlPlot(const Evaluation& e) {
  double low = 0, high = -20;  // decades
  for (const Row& row : e.rows) {
    low = std::min(low, std::floor(std::log10(row.kl())));
    high = std::max(high, std::ceil(std::log10(row.kl())));
  }
  high = std::max(high, low + 1);
  const auto share = [&](double kl) { return (std::log10(kl) - low) / (high - low); };
  std::vector<std::pair<double, std::string>> marks;
  for (double decade = low; decade <= high; ++decade)
    marks.emplace_back(share(std::pow(10.0, decade)), fmt::format("{:g}", std::pow(10.0, decade)));
  return Plot(e, "Mean KL divergence from an f32 cache: lower is better", marks,
              [&](const Row& row) { return share(row.kl()); });
}

std::string TaskPlot(const Evaluation& e) {
  std::vector<std::pair<double, std::string>> marks;
  for (int i = 0; i <= 4; ++i) marks.emplace_back(i / 4.0, fmt::format("{} %", 25 * i));
  return Plot(e,
              fmt::format("Questions, asked {} the text, answered rightly ({}): higher is better",
                          e.ask, fmt::join(e.tasks, ", ")),
              marks, [](const Row& row) { return row.right(); });
}

std::string TableOf(const Evaluation& e) {
  std::string out = "<table><tr><th>cache</th>";
  for (const Column& column : kColumns) out += fmt::format("<th>{}</th>", column.header);
  for (const auto& task : e.tasks) out += fmt::format("<th>{}</th>", Escape(task));
  out += "</tr>\n";
  for (const Row& row : e.rows) {
    out += fmt::format("<tr><td>{}</td>", Escape(row.cache));
    for (size_t c = 0; c < std::size(kColumns); ++c)
      out += fmt::format("<td>{:.{}f}</td>", row.numbers[c], kColumns[c].digits);
    for (const auto& [right, asked] : row.tasks) out += fmt::format("<td>{}/{}</td>", right, asked);
    out += "</tr>\n";
  }
  return out + "</table>\n";
}

// What each head loses, one picture per packed cache under one scale.
std::vector<std::string> ErrorPlots(const Evaluation& e) {
  double keys = 0, values = 0;
  for (const Row& row : e.rows) {
    for (const LayerErrors& layer : row.errors) {
      for (const double x : layer.keys) keys = std::max(keys, x);
      for (const double x : layer.values) values = std::max(values, x);
    }
  }
  std::vector<std::string> plots;
  for (const Row& row : e.rows) {
    if (!row.errors.empty())
      plots.push_back(
          DrawErrors("What each head of " + row.cache + " loses", row.errors, keys, values));
  }
  return plots;
}

std::string Page(const Evaluation& e) {
  std::string out =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>sparkv: bytes and "
      "quality</title>\n<style>body{margin:2rem auto;max-width:960px;font-family:system-ui,"
      "sans-serif;color:#333a44}table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem "
      ".7rem;border-bottom:1px solid #dde1e6;text-align:right}td:first-child,th:first-child{"
      "text-align:left}</style></head><body>\n<h1>Bytes and quality of KV caches</h1>\n";
  out += fmt::format(
      "<p>{}, {} weights; text {}, contexts of {:g} tokens. <span "
      "style=\"color:{}\">&#9679;</span> "
      "sparkv <span style=\"color:{}\">&#9679;</span> llama.cpp. An exact f32 cache that is read "
      "in "
      "another order of sums comes to a mean KL of {:.6f}: differences below that mean "
      "nothing.</p>\n",
      Escape(e.model), Escape(e.weights), Escape(e.text), e.context, kBlue, kSand, e.floor);
  out += KlPlot(e);
  if (!e.tasks.empty()) out += TaskPlot(e);
  out += TableOf(e);
  for (const std::string& plot : ErrorPlots(e)) out += plot;
  for (const Row& row : e.rows) {
    if (!row.saliency.empty())
      out += fmt::format("<h2>Saliency, {}</h2>\n", Escape(row.cache)) + row.saliency;
  }
  return out + "</body></html>\n";
}

std::string Csv(const Evaluation& e) {
  std::string out = "cache,kind";
  for (const Column& column : kColumns) out += fmt::format(",{}", column.field);
  for (const auto& task : e.tasks) out += fmt::format(",{0}_right,{0}_asked", task);
  out += "\n";
  for (const Row& row : e.rows) {
    out += fmt::format("{},{}", row.cache, row.ours ? "sparkv" : "llama.cpp");
    for (const double number : row.numbers) out += fmt::format(",{}", number);
    for (const auto& [right, asked] : row.tasks) out += fmt::format(",{},{}", right, asked);
    out += "\n";
  }
  return out;
}

// The plots, one below the other, by a program that draws SVG.
std::string Png(const Evaluation& e, const std::string& path) {
  const std::string program = FindOnPath("rsvg-convert");
  if (program.empty()) {
    throw Error(kRuntime, fmt::format("--png: {}: needs rsvg-convert on PATH (Debian: "
                                      "librsvg2-bin)",
                                      path));
  }
  std::vector<std::string> plots = {KlPlot(e)};
  if (!e.tasks.empty()) plots.push_back(TaskPlot(e));
  const double height = kHeight * static_cast<double>(plots.size());
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\">\n<rect "
      "width=\"{0}\" height=\"{1}\" fill=\"white\"/>\n",
      kWidth, height);
  for (size_t i = 0; i < plots.size(); ++i) {
    svg += fmt::format(
        "<g transform=\"translate(0 {})\">{}</g>\n", kHeight * static_cast<double>(i),
        plots[i].replace(0, 4, fmt::format("<svg width=\"{}\" height=\"{}\"", kWidth, kHeight)));
  }
  const TemporaryFolder folder;
  WriteFile(folder.File("plots.svg"), svg + "</svg>\n");
  RunToEnd({program, {"--zoom", "2", "-o", folder.File("plots.png"), folder.File("plots.svg")}, {}},
           nullptr, nullptr);
  return ReadFile(folder.File("plots.png"));
}

int Report(const Settings& settings) {
  const Evaluation evaluation = Reader(settings.results).Read();
  std::vector<std::pair<std::string, std::string>> files = {{settings.page, Page(evaluation)}};
  if (!settings.csv.empty()) files.emplace_back(settings.csv, Csv(evaluation));
  if (!settings.png.empty()) files.emplace_back(settings.png, Png(evaluation, settings.png));
  for (const auto& [path, content] : files) RequirePlace(path);
  for (const auto& [path, content] : files) {
    ReplaceFile(path, content);
    fmt::print("{}\n", path);
  }
  return kOk;
}

}  // namespace

std::function<int()> AddReport(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->page = "report.html";
  app->add_option("results", settings->results, "what 'sparkv eval --json' wrote")->required();
  app->add_option("-o,--output", settings->page, "the page")->capture_default_str();
  app->add_option("--csv", settings->csv, "the table as CSV too");
  app->add_option("--png", settings->png, "the plots as a picture too, drawn by rsvg-convert");
  app->footer(
      "Examples\n"
      "  sparkv eval -m model.gguf --kv-preset spark-0.5-i5,spark-0.5-i8 --json > results.json\n"
      "  sparkv report results.json -o report.html --csv report.csv --png report.png");
  return [=] { return Report(*settings); };
}

}  // namespace sparkv

#include "check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "divergence.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

// A model is broken above this divergence. llama.cpp's q4_0, which is known to hurt, comes to .067
// with SmolLM2-135M and .131 with Gemma-3-270m, q8_0/q4_0 to .006 and .005, balanced to .004 and
// .011; spark-0.5-i5 to .005 and, on the model that does not stand it, .062 (docs/results.md).
constexpr double kMostMeanKl = 0.05;
// With quantised weights the exact runs differ, too: the cache must then stand out of that.
constexpr double kTimesFloor = 3;
// q4_0 on SmolLM2-135M still has .87 of the top tokens in common; one token in seven is another
// text altogether. A share of what two exact runs agree on.
constexpr double kLeastTop1 = 0.85;

// Few layers with 8 bits cost little memory; many more than these as much as better numbers for
// all.
constexpr std::pair<int, int> kProtect[] = {{1, 0}, {2, 1}, {4, 2}, {8, 4}};
constexpr const char* kPresets[] = {"balanced", "safe", "spark-0-i8", "exact"};

struct Settings : Reading {
  Settings() { context = 1024, chunks = 1; }
  KvOptions kv;
  bool requantize = false, json = false;
};

struct Limits {
  double mean_kld = 0, top1 = 0;
};

// A word as a shell takes it; only names of files have a character that it would read.
std::string Quoted(const std::string& word) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=:,/";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
  return quoted + "'";
}

// The options as a shell takes them.
std::string Spelled(const KvOptions& options, const Cache& cache) {
  std::string words = "--kv-preset " + cache.name;
  for (const auto& [key, value] : options.values)
    words += fmt::format(" --kv-{} {}", key, Quoted(value));
  return words;
}

// Whether a preset gives the keys and values of a token more bytes than `config` does.
bool KeepsMore(const sparkv_config& preset, const sparkv_config& config) {
  constexpr int32_t kHead = 64;
  const auto bytes = [](const sparkv_config& rows) {
    return sparkv_key_row_bytes(&rows, kHead) + sparkv_value_row_bytes(&rows, kHead);
  };
  return bytes(preset) > bytes(config);
}

// What to try instead of `given`, in this order.
std::vector<KvOptions> Candidates(const KvOptions& given, const sparkv_config& config, int layers) {
  std::vector<KvOptions> candidates;
  for (auto [first, last] : kProtect) {
    first = std::max(first, config.protect_first);
    last = std::max(last, config.protect_last);
    if (first + last >= layers) break;
    if (first == config.protect_first && last == config.protect_last) continue;
    KvOptions next = given;
    next.values["protect"] = fmt::format("first:{}", first);
    if (last > 0) next.values["protect"] += fmt::format(",last:{}", last);
    candidates.push_back(next);
  }
  for (const char* preset : kPresets) {
    KvOptions next = {preset, {}};
    // As it is meant: of the options only those stay that change no number.
    for (const auto& [key, value] : given.values) {
      if (key == "simd" || key == "threads") next.values[key] = value;
    }
    if (KeepsMore(MakeCache(preset, next).config, config)) candidates.push_back(next);
  }
  return candidates;
}

bool Passes(const Json& row, const Limits& limits) {
  // Written so that what is not a number does not pass.
  return std::isfinite(row["perplexity"].get<double>()) &&
         row["mean_kld"].get<double>() <= limits.mean_kld &&
         row["top1_agreement"].get<double>() >= limits.top1;
}

std::string Line(const Json& row) {
  const auto number = [&](const char* field) { return row[field].get<double>(); };
  return fmt::format(
      "{}: {} at {:.2f} bits/element, KL median {:.6f}, mean {:.6f}, perplexity x {:.4f}, top-1 "
      "{:.3f}",
      row["passes"].get<bool>() ? "passes" : "breaks", row["options"].get<std::string>(),
      number("bits_per_element"), number("median_kld"), number("mean_kld"),
      number("perplexity_ratio"), number("top1_agreement"));
}

Json Measure(const Settings& settings, const KvOptions& options, const Limits& limits,
             const TemporaryFolder& folder) {
  const Cache cache = MakeCache(options.preset, options);
  const std::string spelled = Spelled(options, cache);
  Json row = Judge(settings, cache, spelled, folder);
  row["cache"] = cache.name;
  row["options"] = spelled;
  row["passes"] = Passes(row, limits);
  return row;
}

// Options of `given` that `proposed` leaves out; they may come from variables.
std::string LeftOut(const KvOptions& given, const KvOptions& proposed) {
  std::string words;
  for (const auto& [key, value] : given.values) {
    if (proposed.values.count(key) == 0) words += (words.empty() ? "--kv-" : ", --kv-") + key;
  }
  return words;
}

int Check(Settings settings) {
  const Cache cache = MakeCache(settings.kv.preset, settings.kv);
  if (!cache.packed)
    throw Error(kUsage, fmt::format("--kv-preset: '{}' is no packed cache", cache.name));
  RequireModel(settings.model);
  const ModelShape shape = ReadModelShape(settings.model);
  CheckCalibration(cache, shape);
  LetHeadsEvict({cache}, &settings);
  Json report = {{"model", settings.model},
                 {"weights", WeightsName(shape, settings.requantize)},
                 {"context", settings.context},
                 {"machine", Machine()}};
  const TemporaryFolder folder;
  WriteFile(folder.File("text.txt"), BuiltinText());
  ChooseWeights(shape, settings.requantize, &settings.model);
  WriteBase(settings, folder);
  const Json floor = Judge(settings, MakeCache("f32", {}), "f32 cache, -fa on", folder);
  const double floor_kl = floor["mean_kld"], floor_top1 = floor["top1_agreement"];
  if (!std::isfinite(floor["perplexity"].get<double>()) || !std::isfinite(floor_kl))
    throw Error(kRuntime, fmt::format("{}: its perplexity is not finite with an exact f32 cache",
                                      settings.model));
  const Limits limits = {std::max(kMostMeanKl, kTimesFloor * floor_kl), kLeastTop1 * floor_top1};
  report["noise_floor"] = {{"mean_kld", floor_kl}, {"top1_agreement", floor_top1}};
  report["limits"] = {{"mean_kld", limits.mean_kld}, {"top1_agreement", limits.top1}};

  const auto say = [&](const std::string& line) {
    if (settings.json) return;
    fmt::print("{}\n", line);
    std::fflush(stdout);
  };
  Json row = Measure(settings, settings.kv, limits, folder);
  const bool passes = row["passes"];
  say(fmt::format("{} (limits: mean KL {:.4f}, top-1 {:.3f}; {} weights, noise floor {:.6f})",
                  Line(row), limits.mean_kld, limits.top1, report["weights"].get<std::string>(),
                  floor_kl));
  report["passes"] = passes;
  report["result"] = row;
  report["tried"] = Json::array();
  report["proposal"] = nullptr;
  if (!passes) {
    for (const KvOptions& options :
         Candidates(settings.kv, cache.config, static_cast<int>(shape.layers.size()))) {
      try {
        row = Measure(settings, options, limits, folder);
      } catch (const Error& error) {
        // Such as a budget that protected layers exceed: no reason not to try the next one.
        ThrowIfInterrupted();
        Note(error.what());
        continue;
      }
      say("  " + Line(row));
      report["tried"].push_back(row);
      if (!row["passes"]) continue;
      report["proposal"] = row["options"];
      const std::string left_out = LeftOut(settings.kv, options);
      say("use " + row["options"].get<std::string>() +
          (left_out.empty() ? "" : fmt::format(" (without {})", left_out)));
      break;
    }
    if (report["proposal"].is_null())
      say("nothing that was tried passes: leave this model llama.cpp's own cache");
  }
  if (settings.json) PrintJson(report);
  return passes ? kOk : kRuntime;
}

}  // namespace

std::function<int()> AddCheck(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model,
                  "GGUF file; default: LLAMA_ARG_MODEL, else the demo model");
  app->add_option("-t,--threads", settings->threads, "threads; 0: as llama.cpp chooses")
      ->check(CLI::Range(0, 1024));
  app->add_flag("--requantize-f32", settings->requantize,
                "judge with F32 weights, made once and cached");
  app->add_flag("--json", settings->json, "JSON on stdout, with all that was tried");
  AddKvOptions(app, &settings->kv);
  app->footer(fmt::format(
      "Reads {} tokens of an English text with an exact f32 cache and with the packed one. The "
      "model breaks\nwhere its mean KL divergence is above {:g} and {:g} times that of a second "
      "exact run, or where fewer than\n{:g} of the top tokens are the same. Then more layers are "
      "protected and better presets tried, until one passes.\nExit codes: 0 passes, 1 breaks or "
      "failed, 2 wrong usage.\n\n"
      "Examples\n"
      "  sparkv check -m model.gguf\n"
      "  sparkv check -m model.gguf --kv-preset spark-0.8 --requantize-f32 --json",
      settings->context, kMostMeanKl, kTimesFloor, kLeastTop1));
  return [=] { return Check(*settings); };
}

}  // namespace sparkv

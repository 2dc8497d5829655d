#include "calibrate.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>

#include "divergence.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// What the layers of a group are given while all others keep 8 bits: a loss well above the noise
// of float sums, yet small enough to add up over groups.
constexpr const char* kFewBits = "tiers-5321+t2";
// Below so many noise floors the losses of the groups together say nothing.
constexpr double kTimesFloor = 10;
// No group counts less than this share of the mean: what is lost in it is hardly measured.
constexpr double kLeastShare = 0.05;

struct Settings : Reading {
  Settings() { chunks = 1; }
  std::string text, output;
  int groups = 10;
  bool requantize = false, json = false;
};

struct Group {
  size_t first = 0, last = 0;  // layers of the model
  double loss = 0, sensitivity = 1;
  size_t size() const { return last - first + 1; }
};

// Layers that keep a cache, in runs of about the same length.
std::vector<Group> GroupsOf(const ModelShape& shape, int n) {
  const size_t layers = shape.layers.size(), groups = std::min(layers, static_cast<size_t>(n));
  std::vector<Group> result;
  for (size_t g = 0; g < groups; ++g) {
    const Group group{layers * g / groups, layers * (g + 1) / groups - 1, 0, 1};
    const bool keeps = std::any_of(shape.layers.begin() + static_cast<ptrdiff_t>(group.first),
                                   shape.layers.begin() + static_cast<ptrdiff_t>(group.last) + 1,
                                   [](const LayerShape& layer) { return layer.kv_heads > 0; });
    if (keeps) result.push_back(group);
  }
  return result;
}

std::string LayersOf(const Group& group) {
  return group.first == group.last ? fmt::format("{}", group.first)
                                   : fmt::format("{}-{}", group.first, group.last);
}

// The files that the caches of one model left: `path`, `path`.1, ...
std::vector<std::string> TakeParts(const std::string& path) {
  std::vector<std::string> parts;
  for (int i = 0;; ++i) {
    const std::string part = i == 0 ? path : fmt::format("{}.{}", path, i);
    if (!fs::exists(part)) break;
    parts.push_back(ReadFile(part));
  }
  if (parts.empty()) throw Error(kRuntime, "the plugin measured nothing: is its cache in use?");
  return parts;
}

std::string Join(const std::vector<std::string>& parts, const std::string& model,
                 const std::string& sensitivity) {
  std::vector<const void*> bytes;
  std::vector<size_t> sizes;
  for (const std::string& part : parts) {
    bytes.push_back(part.data());
    sizes.push_back(part.size());
  }
  std::string joined;
  sparkv_error error = {};
  for (size_t size = 0; size == 0 || size != joined.size();) {
    joined.resize(size);
    if (sparkv_calibration_join(bytes.data(), sizes.data(), static_cast<int32_t>(parts.size()),
                                model.c_str(), sensitivity.c_str(), joined.data(), &size,
                                &error) != SPARKV_OK) {
      throw Error(kRuntime, error.text);
    }
  }
  return joined;
}

// What each group loses with few bits, and from that its sensitivity; false where noise hides it.
bool MeasureGroups(const Settings& settings, double floor, const TemporaryFolder& folder,
                   std::vector<Group>* groups) {
  double losses = 0;
  size_t layers = 0;
  for (Group& group : *groups) {
    KvOptions options;
    options.values = {{"window", "32"}, {"layers", LayersOf(group) + "=" + kFewBits}};
    const Cache cache = MakeCache("spark-0-i8", options);
    try {
      const double loss = Judge(settings, cache, "layers " + LayersOf(group), folder)["mean_kld"];
      group.loss = std::max(loss - floor, 0.0);
    } catch (const Error& error) {
      // Such as layers that read the cache of others.
      ThrowIfInterrupted();
      Note(fmt::format("layers {} are left out: {}", LayersOf(group), error.what()));
      group.loss = -1;
      continue;
    }
    losses += group.loss;
    layers += group.size();
  }
  std::erase_if(*groups, [](const Group& group) { return group.loss < 0; });
  if (!(losses > kTimesFloor * floor)) return false;
  const double mean = losses / static_cast<double>(layers);
  for (Group& group : *groups) {
    group.sensitivity =
        std::max(group.loss / static_cast<double>(group.size()) / mean, kLeastShare);
  }
  return true;
}

// A model that was named by mistake would be lost.
void RequireCalibrationOrNone(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[7] = "";
  if (fs::is_regular_file(path) && file.read(magic, 1) &&
      (!file.read(magic + 1, 6) || std::string(magic, 7) != "sparkvc")) {
    throw Error(kUsage, fmt::format("-o: {} is there and holds no calibration", path));
  }
}

int Calibrate(Settings settings) {
  RequireModel(settings.model);
  const ModelShape shape = ReadModelShape(settings.model);
  const std::string name = ModelName(shape);
  if (settings.output.empty())
    settings.output = fs::path(settings.model).replace_extension(".calibration").string();
  RequirePlace(settings.output);
  RequireCalibrationOrNone(settings.output);
  const std::string text = settings.text.empty() ? BuiltinText() : ReadFile(settings.text);
  const TemporaryFolder folder;
  WriteFile(folder.File("text.txt"), text);
  ChooseWeights(shape, settings.requantize, &settings.model);

  WriteBase(settings, folder);
  Cache exact = MakeCache("exact", {});
  exact.environment.push_back("SPARKV_CALIBRATE=" + folder.File("energies"));
  const double floor = Judge(settings, exact, "queries and keys", folder)["mean_kld"];
  const std::vector<std::string> parts = TakeParts(folder.File("energies"));

  std::vector<Group> groups = GroupsOf(shape, settings.groups);
  const bool measured = MeasureGroups(settings, std::max(floor, 0.0), folder, &groups);
  std::string sensitivity;
  for (const Group& group : groups) {
    if (measured) {
      sensitivity += fmt::format("{}{}:{:.2f}", sensitivity.empty() ? "" : ",", LayersOf(group),
                                 group.sensitivity);
    }
  }
  if (!measured && !groups.empty()) {
    Note(fmt::format("noise ({:.6f}) hides what the layers lose: only queries and keys are kept{}",
                     floor,
                     shape.Quantised() && !settings.requantize ? "; try --requantize-f32" : ""));
  }
  ReplaceFile(settings.output, Join(parts, name, sensitivity));

  Json report = {{"model", name},
                 {"output", settings.output},
                 {"context", settings.context},
                 {"weights", WeightsName(shape, settings.requantize)},
                 {"noise_floor", floor},
                 {"sensitivity", sensitivity},
                 {"groups", Json::array()}};
  Table table({"layers", "KL", "sensitivity"});
  for (const Group& group : groups) {
    report["groups"].push_back({{"layers", LayersOf(group)},
                                {"mean_kld", group.loss},
                                {"sensitivity", measured ? Json(group.sensitivity) : Json()}});
    table.Add({LayersOf(group), fmt::format("{:.6f}", group.loss),
               measured ? fmt::format("{:.2f}", group.sensitivity) : "-"});
  }
  if (settings.json) {
    PrintJson(report);
    return kOk;
  }
  if (!groups.empty()) table.Print();
  fmt::print("{} is calibrated: --kv-calibration {}\n", name, settings.output);
  return kOk;
}

}  // namespace

std::function<int()> AddCalibrate(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model,
                  "GGUF file; default: LLAMA_ARG_MODEL, else the demo model");
  app->add_option("-f,--file", settings->text,
                  "a text of at least twice the context; default: ours")
      ->check(CLI::ExistingFile);
  app->add_option("-o,--output", settings->output,
                  "default: beside the model, its ending replaced by .calibration");
  app->add_option("-c,--context", settings->context, "tokens to read")
      ->check(CLI::Range(256, 1 << 20));
  app->add_option("-t,--threads", settings->threads, "threads; 0: as llama.cpp chooses")
      ->check(CLI::Range(0, 1024));
  app->add_option("--groups", settings->groups,
                  "runs of layers that are judged, a reading each; 0: queries and keys alone")
      ->check(CLI::Range(0, 32));
  app->add_flag("--requantize-f32", settings->requantize,
                "judge with F32 weights, made once and cached");
  app->add_flag("--json", settings->json, "JSON on stdout");
  app->footer(
      "Reads a text and keeps, for every layer and KV head, how strongly queries and keys use each "
      "channel; then once\nfor each group of layers, which gets few bits while the others keep 8, "
      "and keeps what that loses. With\n--kv-calibration rows take their weights from this file "
      "instead of from the first tokens of a text, and\n--kv-budget spends its bytes where they "
      "count. balanced gains by it; small and tiny lose, their weights should be\n"
      "those of the text. Another model's file is refused.\n\n"
      "Examples\n"
      "  sparkv calibrate -m model.gguf --requantize-f32\n"
      "  sparkv run -m model.gguf --kv-calibration model.calibration -p 'Why is the sky blue?'");
  return [=] { return Calibrate(*settings); };
}

}  // namespace sparkv

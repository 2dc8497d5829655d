#include "inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "gguf.h"
#include "kv_bytes.h"
#include "kv_options.h"
#include "launch.h"
#include "report.h"
#include "saliency.h"

namespace sparkv {
namespace {

constexpr double kMiB = 1024.0 * 1024.0;

struct Settings {
  KvOptions kv;
  std::string model, saliency, output, prompt, prompt_file;
  int64_t context = 0;
  int threads = 0, layer = 0, head = 0;
  bool dump = false, json = false;
};

nlohmann::json LayerReport(const Cache& cache, const ModelShape& model) {
  nlohmann::json groups = nlohmann::json::array();
  for (size_t first = 0, end; first < model.layers.size(); first = end) {
    const LayerShape& layer = model.layers[first];
    const RowBytes row = BytesPerHead(cache, model, first);
    for (end = first + 1; end < model.layers.size() && model.layers[end] == layer &&
                          BytesPerHead(cache, model, end) == row;) {
      ++end;
    }
    groups.push_back(
        {{"first_layer", first},
         {"last_layer", end - 1},
         {"kv_heads", layer.kv_heads},
         {"sliding_window", layer.windowed},
         {"key_row_bytes", row.key},
         {"value_row_bytes", row.value},
         {"bytes_per_token", layer.kv_heads * (row.key + row.value)},
         {"f16_bytes_per_token", layer.kv_heads * 2.0 * (model.key_length + model.value_length)}});
  }
  return groups;
}

nlohmann::json CacheReport(const Cache& cache, const ModelShape& model, int64_t context) {
  const double bytes = PredictedBytes(cache, model, context);
  return {{"cache", cache.name},
          {"bits_per_element", 8 * bytes / Elements(model, context)},
          {"mib", bytes / kMiB},
          {"share_of_f16", bytes / (2.0 * Elements(model, context))}};
}

void PrintLayout(const nlohmann::json& report, const Cache& cache) {
  const auto& model = report["model"];
  fmt::print("{}: {}, {} layers, {} query heads, head size K {} V {}\n",
             model["path"].get<std::string>(), model["architecture"].get<std::string>(),
             model["layers"].get<int>(), model["heads"].get<int>(), model["key_length"].get<int>(),
             model["value_length"].get<int>());
  char text[4096];
  sparkv_config_text(&cache.config, text, sizeof(text));
  fmt::print("{}\n\n", cache.packed ? text : cache.name);
  Table layers({"layers", "KV heads", "window", "K row B", "V row B", "B/token", "f16 B/token"});
  for (const auto& group : report["layers"]) {
    layers.Add(
        {fmt::format("{}-{}", group["first_layer"].get<int>(), group["last_layer"].get<int>()),
         fmt::format("{}", group["kv_heads"].get<int>()),
         group["sliding_window"].get<bool>() ? fmt::format("{}", model["sliding_window"].get<int>())
                                             : "-",
         fmt::format("{:g}", group["key_row_bytes"].get<double>()),
         fmt::format("{:g}", group["value_row_bytes"].get<double>()),
         fmt::format("{:g}", group["bytes_per_token"].get<double>()),
         fmt::format("{:g}", group["f16_bytes_per_token"].get<double>())});
  }
  layers.Print();
  fmt::print(
      "\nPredicted for {} tokens (rows, sinks, window, one table per head; page slack not "
      "counted)\n",
      report["context"].get<int64_t>());
  Table caches({"cache", "bits/element", "MiB", "of f16"});
  for (const auto& row : report["caches"]) {
    caches.Add({row["cache"].get<std::string>(),
                fmt::format("{:.2f}", row["bits_per_element"].get<double>()),
                fmt::format("{:.1f}", row["mib"].get<double>()),
                fmt::format("{:.0f} %", 100 * row["share_of_f16"].get<double>())});
  }
  caches.Print();
}

int Layout(const Settings& settings) {
  Cache cache = MakeCache(settings.kv.preset, settings.kv);
  RequireModel(settings.model);
  const ModelShape model = ReadCachedModelShape(settings.model);
  CheckCalibration(cache, model);
  const int64_t context =
      settings.context > 0 ? settings.context : std::max(1, model.context_length);
  cache = SolveBudget(std::move(cache), model, context);
  NoteEvictions({cache});

  nlohmann::json report = {{"model",
                            {{"path", settings.model},
                             {"architecture", model.architecture},
                             {"name", model.name},
                             {"layers", model.layers.size()},
                             {"heads", model.heads},
                             {"key_length", model.key_length},
                             {"value_length", model.value_length},
                             {"sliding_window", model.sliding_window},
                             {"context_length", model.context_length}}},
                           {"context", context},
                           {"layers", LayerReport(cache, model)},
                           {"caches", nlohmann::json::array()}};
  for (const char* name : {"f16", "q8_0", "q4_0"})
    report["caches"].push_back(CacheReport(MakeCache(name, {}), model, context));
  if (cache.packed) report["caches"].push_back(CacheReport(cache, model, context));
  if (settings.json) {
    PrintJson(report);
  } else {
    PrintLayout(report, cache);
  }
  return kOk;
}

// Runs the prompt through the model and takes what the plugin writes about one head.
std::string DumpSaliency(const Settings& settings) {
  const Cache cache = MakeCache(settings.kv.preset, settings.kv);
  if (!cache.packed)
    throw Error(kUsage, fmt::format("--kv-preset: {} prunes nothing to draw", cache.name));
  RequireModel(settings.model);
  if (settings.prompt.empty() == settings.prompt_file.empty())
    throw Error(kUsage, "--dump-saliency: needs one of -p and -f");
  const ModelShape model = ReadModelShape(settings.model);
  CheckCalibration(cache, model);
  const int layers = static_cast<int>(model.layers.size());
  if (settings.layer >= layers) {
    throw Error(kUsage, fmt::format("--layer: {} is outside 0..{}", settings.layer, layers - 1));
  }
  if (const int heads = model.layers[settings.layer].kv_heads; settings.head >= heads) {
    throw Error(kUsage, fmt::format("--head: {} is outside 0..{}", settings.head, heads - 1));
  }
  const TemporaryFolder folder;
  std::vector<std::string> args = {"-m", settings.model, "-n",
                                   "1",  "-no-cnv",      "--no-display-prompt"};
  if (settings.prompt_file.empty()) {
    args.insert(args.end(), {"-p", settings.prompt});
  } else {
    args.insert(args.end(), {"-f", settings.prompt_file});
  }
  if (settings.context > 0) args.insert(args.end(), {"-c", fmt::format("{}", settings.context)});
  if (settings.threads > 0) args.insert(args.end(), {"-t", fmt::format("{}", settings.threads)});
  Command command = MakeCommand("llama-completion", cache, args);
  const std::string file = folder.File("saliency.json");
  command.environment.push_back(
      fmt::format("SPARKV_SALIENCY={}:{}:{}", file, settings.layer, settings.head));
  Progress progress("llama-completion");
  progress.Update("reading the prompt");
  RunToEnd(command, nullptr, nullptr);
  return ReadFile(file);
}

int Saliency(const Settings& settings) {
  const bool page = settings.output.ends_with(".html");
  if (!page && !settings.output.ends_with(".svg") && !settings.output.ends_with(".json")) {
    throw Error(kUsage,
                fmt::format("-o: '{}' does not end in .svg, .html or .json", settings.output));
  }
  RequirePlace(settings.output);
  const std::string data = settings.dump ? DumpSaliency(settings) : ReadFile(settings.saliency);
  const std::string source = settings.dump ? "SPARKV_SALIENCY" : settings.saliency;
  if (settings.output.ends_with(".json")) {
    ReplaceFile(settings.output, data);
  } else {
    const std::string svg = DrawSaliency(data, source);
    ReplaceFile(settings.output, page ? SaliencyPage(svg) : svg);
  }
  if (settings.json) {
    PrintJson({{"picture", settings.output}});
  } else {
    fmt::print("{}\n", settings.output);
  }
  return kOk;
}

}  // namespace

std::function<int()> AddInspect(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model,
                  "GGUF file; only its metadata is read, except with --dump-saliency");
  app->add_option("-c,--ctx-size", settings->context,
                  "tokens to predict for; the model's own context when 0")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 32));
  auto* saliency = app->add_option("--saliency", settings->saliency,
                                   "draw this file, which SPARKV_SALIENCY wrote");
  auto* dump = app->add_flag("--dump-saliency", settings->dump,
                             "run the model on -p or -f and draw one head");
  saliency->excludes(dump);
  app->add_option("-p,--prompt", settings->prompt, "prompt for --dump-saliency");
  app->add_option("-f,--file", settings->prompt_file, "the same from a file");
  app->add_option("-t,--threads", settings->threads, "threads for --dump-saliency")
      ->check(CLI::Range(0, 1024));
  app->add_option("--layer", settings->layer, "layer to draw")->check(CLI::Range(0, 4095));
  app->add_option("--head", settings->head, "KV head to draw")->check(CLI::Range(0, 1023));
  settings->output = "saliency.html";
  app->add_option("-o,--output", settings->output, "picture: .svg or .html; or .json for the data")
      ->capture_default_str();
  app->add_flag("--json", settings->json, "JSON on stdout");
  AddKvOptions(app, &settings->kv);
  app->footer(
      "Examples\n"
      "  sparkv inspect -m model.gguf -c 32768\n"
      "  sparkv inspect -m model.gguf --kv-preset spark-0.8 --json\n"
      "  sparkv inspect -m model.gguf --dump-saliency -f report.txt --layer 12 --head 1 -o "
      "head.svg\n"
      "  SPARKV_SALIENCY=data.json:12:1 llama-completion ...; sparkv inspect --saliency data.json "
      "-o head.html");
  return [=] {
    return settings->dump || !settings->saliency.empty() ? Saliency(*settings) : Layout(*settings);
  };
}

}  // namespace sparkv

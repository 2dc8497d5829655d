#include "bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>

#include "kv_options.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

struct Settings {
  KvOptions kv;
  std::string model, prompt = "512", gen = "32", depth = "0,4096", baselines = "f16", format = "md";
  std::string batch = "2048", ubatch = "512";
  int repetitions = 3, threads = 0;
  bool json = false;
};

// Tokens per second of one test, one per repetition, by cache.
struct Test {
  int n_prompt = 0, n_gen = 0, n_depth = 0;
  std::map<std::string, std::vector<double>> speed;

  std::string Name() const {
    return fmt::format("{} @ d{}",
                       n_gen ? fmt::format("tg{}", n_gen) : fmt::format("pp{}", n_prompt), n_depth);
  }
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

Json RunOnce(const Settings& settings, const Cache& cache) {
  std::vector<std::string> args = {
      "-m", settings.model, "-p",  settings.prompt, "-n", settings.gen, "-d", settings.depth,
      "-b", settings.batch, "-ub", settings.ubatch, "-r", "1",          "-o", "json"};
  if (settings.threads > 0) args.insert(args.end(), {"-t", fmt::format("{}", settings.threads)});
  std::string text;
  RunToEnd(
      MakeCommand("llama-bench", cache, args),
      [&](const std::string& line) { text += line + "\n"; }, nullptr);
  const Json results = Json::parse(text, nullptr, false);
  if (!results.is_array()) throw Error(kRuntime, "llama-bench: its output is not a JSON array");
  return results;
}

void Record(const Json& results, const std::string& cache, std::vector<Test>* tests) {
  for (const auto& result : results) {
    const int prompt = result.at("n_prompt"), gen = result.at("n_gen"),
              depth = result.at("n_depth");
    auto test = std::find_if(tests->begin(), tests->end(), [&](const Test& t) {
      return t.n_prompt == prompt && t.n_gen == gen && t.n_depth == depth;
    });
    if (test == tests->end()) test = tests->insert(tests->end(), {prompt, gen, depth, {}});
    test->speed[cache].push_back(result.at("avg_ts"));
  }
}

Json Report(const Test& test, const std::vector<Cache>& caches, const Json& common) {
  Json rows = Json::array();
  const auto& base = test.speed.at(caches[0].name);
  for (const Cache& cache : caches) {
    const auto& speed = test.speed.at(cache.name);
    // A ratio pairs the runs of one round, which stood next to each other in time.
    std::vector<double> ratios;
    for (size_t i = 0; i < speed.size(); ++i) ratios.push_back(speed[i] / base[i]);
    const auto [low, high] = std::minmax_element(ratios.begin(), ratios.end());
    Json row = {{"test", test.Name()},     {"n_prompt", test.n_prompt}, {"n_gen", test.n_gen},
                {"n_depth", test.n_depth}, {"cache", cache.name},       {"avg_ts", Median(speed)},
                {"samples_ts", speed},     {"ratio", Median(ratios)},   {"ratio_min", *low},
                {"ratio_max", *high}};
    row.update(common);
    rows.push_back(row);
  }
  return rows;
}

void PrintCsv(const Json& rows) {
  const std::vector<std::string> columns = {
      "model_filename", "model_type", "n_threads", "n_ubatch", "n_prompt",  "n_gen",
      "n_depth",        "cache",      "avg_ts",    "ratio",    "ratio_min", "ratio_max"};
  fmt::print("{}\n", fmt::join(columns, ","));
  for (const auto& row : rows) {
    std::vector<std::string> cells;
    for (const auto& column : columns) cells.push_back(row.at(column).dump());
    fmt::print("{}\n", fmt::join(cells, ","));
  }
}

void PrintTable(const Json& report) {
  const auto& machine = report["machine"];
  const auto& rows = report["results"];
  fmt::print(
      "{}, {} cores, load {:.2f} at the start; {}, {} threads; median of {} rounds taking turns, "
      "OMP_WAIT_POLICY={}\n\n",
      machine["cpu"].get<std::string>(), machine["cores"].get<int>(), machine["load"].get<double>(),
      rows[0]["model_type"].get<std::string>(), rows[0]["n_threads"].get<int>(),
      report["rounds"].get<int>(), report["omp_wait_policy"].get<std::string>());
  Table table({"test", "cache", "tokens/s", fmt::format("x {}", report["base"].get<std::string>()),
               "spread"});
  for (const auto& row : rows) {
    table.Add({row["test"], row["cache"], fmt::format("{:.2f}", row["avg_ts"].get<double>()),
               fmt::format("{:.2f}", row["ratio"].get<double>()),
               fmt::format("{:.2f}-{:.2f}", row["ratio_min"].get<double>(),
                           row["ratio_max"].get<double>())});
  }
  table.PrintMarkdown();
}

// llama-bench fills a cache with whole micro-batches. What happens when a prompt has ended happens
// at the first token that comes alone.
void NoteWhatWaits(const std::vector<Cache>& caches, const std::vector<Test>& tests) {
  if (std::none_of(tests.begin(), tests.end(), [](const Test& t) { return t.n_depth > 0; })) return;
  for (const Cache& cache : caches) {
    const bool packs = cache.packed && cache.config.seal == SPARKV_SEAL_PREFILL_END;
    if (!packs && !cache.Evicts()) continue;
    Note(
        fmt::format("{} {} at the first token that is generated, whose time has it; prompts at a "
                    "depth (pp) find nothing {}",
                    cache.name, packs ? "packs" : "evicts", packs ? "packed" : "evicted"));
  }
}

int Bench(const Settings& settings) {
  const std::vector<Cache> caches = MakeCaches(settings.baselines, settings.kv);
  RequireModel(settings.model);
  const auto calibrated = std::find_if(caches.begin(), caches.end(), [](const Cache& cache) {
    return !cache.calibrated_for.empty();
  });
  if (calibrated != caches.end()) CheckCalibration(*calibrated, ReadModelShape(settings.model));

  const char* policy = getenv("OMP_WAIT_POLICY");
  Json report = {{"machine", Machine()},
                 {"rounds", settings.repetitions},
                 {"base", caches[0].name},
                 {"omp_wait_policy", policy ? policy : "passive"},
                 {"results", Json::array()}};
  std::vector<Test> tests;
  Json common;
  Progress progress("bench");
  const size_t runs = settings.repetitions * caches.size();
  for (size_t run = 0; run < runs; ++run) {
    // Every second round goes backwards, so that a slow drift of the machine hits all caches alike.
    const size_t round = run / caches.size(), place = run % caches.size();
    const Cache& cache = caches[round % 2 ? caches.size() - 1 - place : place];
    progress.Update(fmt::format("round {} of {}, {}", round + 1, settings.repetitions, cache.name));
    const Json results = RunOnce(settings, cache);
    if (results.empty()) throw Error(kUsage, "-p, -n: nothing to measure");
    for (const char* field :
         {"model_filename", "model_type", "n_threads", "n_batch", "n_ubatch", "build_commit"}) {
      common[field] = results[0].value(field, Json());
    }
    Record(results, cache.name, &tests);
  }
  progress.Done();
  NoteWhatWaits(caches, tests);
  for (const Test& test : tests) {
    for (const auto& row : Report(test, caches, common)) report["results"].push_back(row);
  }
  if (settings.json || settings.format == "json") {
    PrintJson(report);
  } else if (settings.format == "jsonl") {
    for (const auto& row : report["results"]) fmt::print("{}\n", row.dump());
  } else if (settings.format == "csv") {
    PrintCsv(report["results"]);
  } else {
    PrintTable(report);
  }
  return kOk;
}

}  // namespace

std::function<int()> AddBench(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model,
                  "GGUF file; default: LLAMA_ARG_MODEL, else the demo model");
  app->add_option("-p,--n-prompt", settings->prompt,
                  "prompt tokens, a list as llama-bench takes it; 0: none")
      ->capture_default_str();
  app->add_option("-n,--n-gen", settings->gen, "generated tokens; 0: none")->capture_default_str();
  app->add_option("-d,--n-depth", settings->depth, "tokens already in the cache")
      ->capture_default_str();
  app->add_option("-r,--repetitions", settings->repetitions,
                  "rounds; in each, every cache runs once")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app->add_option("-t,--threads", settings->threads, "threads; 0: as llama-bench chooses")
      ->check(CLI::Range(0, 1024));
  app->add_option("-b,--batch-size", settings->batch, "logical batch")->capture_default_str();
  app->add_option("--ubatch-size", settings->ubatch, "physical batch (-ub)")->capture_default_str();
  app->add_option("--baselines", settings->baselines,
                  "llama.cpp caches to compare with; ratios are to the first; q8_0/q4_0: keys and "
                  "values apart")
      ->capture_default_str();
  app->add_option("-o,--output", settings->format, "how the result is written")
      ->type_name("md|csv|json|jsonl")
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}))
      ->capture_default_str();
  app->add_flag("--json", settings->json, "the same as -o json");
  AddKvOptions(app, &settings->kv);
  app->footer(
      "--kv-preset takes a list here.\n\n"
      "Examples\n"
      "  sparkv bench -m model.gguf -p 0 -n 32 -d 8192 -t 1\n"
      "  sparkv bench -m model.gguf --kv-preset spark-0.5-i8,spark-0.5-i5 --baselines "
      "f16,q8_0,q4_0 -o csv");
  return [=] { return Bench(*settings); };
}

}  // namespace sparkv

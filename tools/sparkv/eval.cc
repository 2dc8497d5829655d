#include "eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "divergence.h"
#include "gguf.h"
#include "http.h"
#include "kv_options.h"
#include "launch.h"
#include "partial.h"
#include "report.h"
#include "tasks.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

constexpr size_t kAnswerTokens = 8;
// What the completion offers for --baselines.
constexpr char kBaselineNames[] =
    "f16|q8_0|q5_1|q4_0|q8_0/q4_0|kivi-2|kivi-4|turboquant-2|turboquant-3|turboquant-4|think-0.5|"
    "mustafar-0.5|q8_0-rows|q5_1-rows|q4_0-rows";

struct Settings : Reading {
  KvOptions kv;
  std::string file, resume, baselines = "f16,q8_0,q4_0";
  std::vector<std::string> tasks = {"passcode"};
  std::string ask = "after";
  int questions = 8, task_words = 1000;
  uint32_t seed = 1;
  bool requantize = false, json = false;
};

// Two exact readings beside the base, the bounds of what the other numbers can tell: the same one
// again, and one that computes attention as the compared caches do.
Json NoiseFloor(const Settings& settings, const TemporaryFolder& folder) {
  const Cache f32 = MakeCache("f32", {});
  return {{"same_run", Judge(settings, f32, "f32 cache again", folder, {"-fa", "off"})["mean_kld"]},
          {"flash_attention", Judge(settings, f32, "f32 cache, -fa on", folder)["mean_kld"]}};
}

// A task as the server takes it.
struct TokenTask {
  Task task;
  Json text;                  // read once before the questions; null where each brings its own
  std::vector<Json> prompts;  // each with the text and a question at its end
  size_t longest = 0;         // tokens of a prompt and the answer
};

std::vector<std::string> ServerArguments(const Settings& settings, size_t context) {
  std::vector<std::string> args = {
      "-m",  settings.model, "-c", fmt::format("{}", context), "-np", "1", "-fit",
      "off", "--cache-ram",  "0"};
  const auto sizes = settings.SizeFlags();
  args.insert(args.end(), sizes.begin(), sizes.end());
  return args;
}

// Servers are asked in JSON.
void RequireUtf8(const Task& task, const std::string& file) {
  try {
    (void)Json(task.text).dump();
  } catch (const Json::exception&) {
    throw Error(kUsage, fmt::format("--file: {} is not UTF-8, as '{}' needs it; --questions 0 asks "
                                    "none",
                                    file, task.name));
  }
}

// Once for all caches: their servers then get a context that fits.
std::vector<TokenTask> Tokenise(const Settings& settings, const std::vector<Task>& tasks, int limit,
                                const TemporaryFolder& folder) {
  std::vector<TokenTask> out;
  if (tasks.empty()) return out;
  Server server(MakeCache("f16", {}), ServerArguments(settings, 256), folder.File("tokens.log"),
                {});
  const auto tokens = [&](const std::string& text, bool first) {
    return server
        .Post("/tokenize", {{"content", text}, {"add_special", first}, {"parse_special", false}})
        .at("tokens");
  };
  for (const Task& task : tasks) {
    TokenTask made{task, nullptr, {}};
    if (settings.ask == "after") made.text = tokens(task.text, true);
    for (const auto& item : task.items) {
      Json prompt =
          made.text.is_null() ? tokens(QuestionFirst(task.text, item.question), true) : made.text;
      for (const auto& token : tokens(item.question, false)) prompt.push_back(token);
      made.longest = std::max(made.longest, prompt.size() + kAnswerTokens);
      made.prompts.push_back(std::move(prompt));
    }
    if (limit > 0 && made.longest > size_t(limit)) {
      throw Error(kUsage, fmt::format("--task-words: '{}' takes {} tokens, the model is for {}",
                                      made.task.name, made.longest, limit));
    }
    out.push_back(std::move(made));
  }
  return out;
}

// Tokens and their time as the server reports them, over all requests.
struct Speed {
  double tokens = 0, ms = 0;
  Json PerSecond() const { return tokens > 0 && ms > 0 ? Json(1000 * tokens / ms) : Json(); }
};

struct Speeds {
  Speed prefill, decode;
};

Json RunTask(const TokenTask& task, Server* server, const std::string& cache, Speeds* speeds) {
  Progress progress(fmt::format("{}, {}", cache, task.task.name));
  const auto complete = [&](const Json& prompt, size_t predict, bool reuse) {
    return server->Post("/completion", {{"prompt", prompt},
                                        {"n_predict", predict},
                                        {"temperature", 0},
                                        {"cache_prompt", reuse},
                                        {"id_slot", 0}});
  };
  const auto count = [](const Json& reply, const std::string& kind, int untimed, Speed* speed) {
    const Json timings = reply.value("timings", Json::object());
    speed->tokens += std::max(0.0, timings.value(kind + "_n", 0.0) - untimed);
    speed->ms += timings.value(kind + "_ms", 0.0);
  };
  // Nothing of the prompt before is kept where a text is read; questions after it keep what was.
  const bool read_once = !task.text.is_null();
  if (read_once) {
    progress.Update(fmt::format("reading {} tokens", task.text.size()));
    count(complete(task.text, 1, false), "prompt", 0, &speeds->prefill);
  }
  Json result = {{"tokens", (read_once ? task.text : task.prompts[0]).size()},
                 {"answers", Json::array()}};
  int right = 0;
  for (size_t i = 0; i < task.prompts.size(); ++i) {
    progress.Update(fmt::format("question {} of {}", i + 1, task.prompts.size()));
    const Json reply = complete(task.prompts[i], kAnswerTokens, read_once);
    if (!read_once) count(reply, "prompt", 0, &speeds->prefill);
    // The first token of an answer comes with its question: no step of its own.
    count(reply, "predicted", 1, &speeds->decode);
    const std::string answer = reply.at("content");
    const auto& item = task.task.items[i];
    const bool is_right = IsRight(answer, item.expected);
    right += is_right;
    result["answers"].push_back({{"question", item.question},
                                 {"expected", item.expected},
                                 {"answer", answer},
                                 {"right", is_right}});
  }
  result["right"] = right;
  result["asked"] = task.prompts.size();
  return result;
}

// Adds to a row what the tasks tell: answers, speed, and the memory of the server after the last
// answer and at most, weights included.
void RunTasks(const Settings& settings, const Cache& cache, const std::vector<TokenTask>& tasks,
              const TemporaryFolder& folder, Json* row) {
  Json& results = (*row)["tasks"] = Json::object();
  if (tasks.empty()) return;
  size_t context = 0;
  for (const auto& task : tasks) context = std::max(context, task.longest);
  Server server(cache, ServerArguments(settings, context), folder.File("server.log"), {});
  Speeds speeds;
  for (const auto& task : tasks)
    results[task.task.name] = RunTask(task, &server, cache.name, &speeds);
  (*row)["prefill_tokens_per_s"] = speeds.prefill.PerSecond();
  (*row)["decode_tokens_per_s"] = speeds.decode.PerSecond();
  const Memory memory = server.MemoryUse();
  if (memory.peak == 0) return;
  (*row)["process_resident_mib"] = memory.resident / 1048576.0;
  (*row)["process_peak_mib"] = memory.peak / 1048576.0;
}

struct Column {
  const char* field;
  const char* header;
  int digits;
};

constexpr Column kColumns[] = {
    {"bits_per_element", "bits/element", 2}, {"perplexity", "perplexity", 3},
    {"perplexity_ratio", "x base", 4},       {"mean_kld", "mean KL", 6},
    {"median_kld", "median KL", 6},          {"kld_99", "99 % KL", 5},
    {"top1_agreement", "top-1", 3}};
// Of the tasks' server; missing without tasks.
constexpr Column kServerColumns[] = {{"process_resident_mib", "resident MiB", 1},
                                     {"process_peak_mib", "peak MiB", 1},
                                     {"prefill_tokens_per_s", "prefill t/s", 1},
                                     {"decode_tokens_per_s", "decode t/s", 1}};

// Missing without tasks or without f16.
constexpr Column kOfF16 = {"right_of_f16", "of f16", 2};

// Right answers over all tasks as a share of those with f16, where that is compared and has any.
void CompareWithF16(const Json& tasks, std::vector<Json>* rows) {
  const auto right = [&](const Json& row) {
    double sum = 0;
    for (const auto& task : tasks)
      sum += row["tasks"][task.get<std::string>()]["right"].get<double>();
    return sum;
  };
  const auto f16 = std::find_if(rows->begin(), rows->end(),
                                [](const Json& row) { return row["cache"] == "f16"; });
  if (f16 == rows->end() || tasks.empty()) return;
  const double most = right(*f16);
  for (Json& row : *rows) row[kOfF16.field] = most > 0 ? Json(right(row) / most) : Json();
}

void PrintTable(const Json& report) {
  fmt::print("{}, {} weights; text {}, -c {}; KL to an f32 cache with -fa off{}{}\n\n",
             report["model"].get<std::string>(), report["weights"].get<std::string>(),
             report["text"].get<std::string>(), report["context"].get<int>(),
             report["alone_every"] == 0 ? ""
                                        : fmt::format("; heads evict: every {}th token comes alone",
                                                      report["alone_every"].get<int>()),
             report["tasks"].empty()
                 ? ""
                 : fmt::format("; questions asked {} the text", report["ask"].get<std::string>()));
  std::vector<std::string> header = {"cache"};
  for (const Column& column : kColumns) header.push_back(column.header);
  for (const auto& task : report["tasks"]) header.push_back(task);
  std::vector<Column> task_columns;
  if (report["results"][0].contains(kOfF16.field)) task_columns.push_back(kOfF16);
  if (!report["tasks"].empty())
    task_columns.insert(task_columns.end(), std::begin(kServerColumns), std::end(kServerColumns));
  for (const Column& column : task_columns) header.push_back(column.header);
  Table table(header);
  for (const auto& row : report["results"]) {
    std::vector<std::string> cells = {row["cache"]};
    for (const Column& column : kColumns)
      cells.push_back(fmt::format("{:.{}f}", row[column.field].get<double>(), column.digits));
    for (const auto& task : report["tasks"]) {
      const Json& done = row["tasks"][task.get<std::string>()];
      cells.push_back(fmt::format("{}/{}", done["right"].get<int>(), done["asked"].get<int>()));
    }
    for (const Column& column : task_columns) {
      const Json value = row.value(column.field, Json());
      cells.push_back(value.is_number() ? fmt::format("{:.{}f}", value.get<double>(), column.digits)
                                        : "-");
    }
    table.Add(cells);
  }
  table.PrintMarkdown();
  const Json& floor = report["noise_floor"];
  fmt::print(
      "\nnoise floor, mean KL of an exact f32 cache: {:.6f} the same run again, {:.6f} with -fa on "
      "as all rows have it\n",
      floor["same_run"].get<double>(), floor["flash_attention"].get<double>());
}

std::string CalibrationHash(const KvOptions& options) {
  const auto file = options.values.find("calibration");
  return file == options.values.end() ? "none" : TextHash(ReadFile(file->second));
}

// All that a number depends on but the cache itself: results of other settings are never mixed.
Json ResumeSettings(const Settings& settings, const std::vector<Cache>& caches,
                    const std::string& prose, const Json& tasks) {
  const bool packed =
      std::any_of(caches.begin(), caches.end(), [](const Cache& cache) { return cache.packed; });
  return {{"version", sparkv_version()},
          {"llama-perplexity", FileStamp(FindProgram("llama-perplexity"))},
          {"plugin", packed ? FileStamp(FindPlugin()) : "none"},
          {"cpu", Machine()["cpu"]},
          {"model", FileStamp(settings.model)},
          {"requantize-f32", settings.requantize},
          {"text", TextHash(prose)},
          {"ctx-size", settings.context},
          {"batch-size", settings.batch},
          {"ubatch-size", settings.ubatch},
          {"a token alone every", settings.alone_every},
          {"chunks", settings.chunks},
          {"threads", settings.threads},
          {"tasks", tasks},
          {"task-words", settings.task_words},
          {"questions", settings.questions},
          {"ask", settings.ask},
          {"seed", settings.seed},
          {"kv options", settings.kv.values},
          {"calibration", CalibrationHash(settings.kv)}};
}

int Eval(Settings settings) {
  settings.heads = true;
  if (settings.chunks == 0) throw Error(kUsage, "--chunks: 0 reads nothing; -1: all");
  const std::vector<Cache> caches = MakeCaches(settings.baselines, settings.kv, true);
  RequireModel(settings.model);
  const TemporaryFolder folder;
  const std::string prose = settings.file.empty() ? BuiltinText() : ReadFile(settings.file);
  WriteFile(folder.File("text.txt"), prose);
  const std::vector<Task> tasks =
      MakeTasks(settings.tasks, prose, settings.task_words, settings.questions, settings.seed);
  for (const Task& task : tasks) RequireUtf8(task, settings.file);
  const ModelShape shape = ReadModelShape(settings.model);
  for (const Cache& cache : caches) CheckCalibration(cache, shape);
  LetHeadsEvict(caches, &settings);

  Json report = {
      {"model", settings.model},     {"text", settings.file.empty() ? "built in" : settings.file},
      {"context", settings.context}, {"batch", settings.batch},
      {"ubatch", settings.ubatch},   {"alone_every", settings.alone_every},
      {"seed", settings.seed},       {"ask", settings.ask},
      {"machine", Machine()},        {"tasks", Json::array()}};
  std::vector<std::string> numbers;
  for (const Column& column : kColumns) numbers.push_back(fmt::format("/{}", column.field));
  for (const Task& task : tasks) {
    report["tasks"].push_back(task.name);
    for (const char* field : {"right", "asked"})
      numbers.push_back(fmt::format("/tasks/{}/{}", task.name, field));
  }
  report["weights"] = WeightsName(shape, settings.requantize);

  PartialResults partial(settings.resume, ResumeSettings(settings, caches, prose, report["tasks"]));
  Json floor = partial.Find("noise floor", {"/same_run", "/flash_attention"});
  std::vector<Json> rows;
  for (const Cache& cache : caches) rows.push_back(partial.Find(cache.name, numbers));
  const auto done =
      std::count_if(rows.begin(), rows.end(), [](const Json& row) { return !row.is_null(); });
  if (done > 0) {
    Note(fmt::format("{}: {} of {} caches are done already", settings.resume, done, caches.size()));
  }
  if (floor.is_null() || done < static_cast<long>(caches.size())) {
    ChooseWeights(shape, settings.requantize, &settings.model);
    const auto token_tasks = Tokenise(settings, tasks, shape.context_length, folder);
    WriteBase(settings, folder);
    if (floor.is_null()) {
      floor = NoiseFloor(settings, folder);
      partial.Add("noise floor", floor);
    }
    for (size_t i = 0; i < caches.size(); ++i) {
      if (!rows[i].is_null()) continue;
      rows[i] = Judge(settings, caches[i], caches[i].name, folder);
      RunTasks(settings, caches[i], token_tasks, folder, &rows[i]);
      partial.Add(caches[i].name, rows[i]);
    }
  }
  report["noise_floor"] = floor;
  for (size_t i = 0; i < caches.size(); ++i) rows[i]["cache"] = caches[i].name;
  CompareWithF16(report["tasks"], &rows);
  report["results"] = rows;
  if (settings.json) {
    PrintJson(report);
  } else {
    PrintTable(report);
  }
  return kOk;
}

}  // namespace

std::function<int()> AddEval(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model,
                  "GGUF file; default: LLAMA_ARG_MODEL, else the demo model");
  app->add_option("-f,--file", settings->file,
                  "text, longer than two contexts; an English text is built in");
  app->add_option("-c,--ctx-size", settings->context,
                  "tokens per chunk; the second half of each is scored")
      ->check(CLI::Range(64, 1 << 20))
      ->capture_default_str();
  app->add_option("-b,--batch-size", settings->batch, "logical batch")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--ubatch-size", settings->ubatch,
                  "physical batch (-ub); with an eviction its last token comes alone")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--chunks", settings->chunks, "chunks of the text, -1: all")
      ->check(CLI::Range(-1, 1 << 20))
      ->capture_default_str();
  app->add_option("-t,--threads", settings->threads, "threads; 0: as llama.cpp chooses")
      ->check(CLI::Range(0, 1024));
  app->add_option(
         "--baselines", settings->baselines,
         "list of llama.cpp caches (q8_0/q4_0: keys and values apart) and codecs of others "
         "to compare with, see below")
      ->type_name(kBaselineNames)
      ->capture_default_str();
  app->add_option("--tasks", settings->tasks, "list of retrieval tasks, see below")
      ->delimiter(',')
      ->check(CLI::IsMember(TaskNames()))
      ->type_name(fmt::format("{}", fmt::join(TaskNames(), "|")))
      ->default_str("passcode");
  app->add_option("--task-words", settings->task_words, "words of the text of a task")
      ->check(CLI::Range(100, 100000))
      ->capture_default_str();
  app->add_option("--questions", settings->questions, "questions of a task, 0: no tasks")
      ->check(CLI::Range(0, 16))
      ->capture_default_str();
  app->add_option("--ask", settings->ask,
                  "before: each question stands in front of the text, too, and each reads it anew")
      ->type_name("after|before")
      ->check(CLI::IsMember({"after", "before"}))
      ->capture_default_str();
  app->add_option("-s,--seed", settings->seed, "seed of the tasks")->capture_default_str();
  app->add_option("--resume", settings->resume,
                  "file of the results so far; what it has is not measured again")
      ->type_name("FILE");
  app->add_flag("--requantize-f32", settings->requantize,
                "judge with F32 weights, made once and cached");
  app->add_flag("--json", settings->json, "JSON on stdout, with every answer");
  AddKvOptions(app, &settings->kv);
  app->footer(
      "--kv-preset takes a list here. The base of all KL divergences is an f32 cache with -fa "
      "off.\n"
      "Heads evict when a token comes alone: with an eviction, the last of every --ubatch-size "
      "tokens does, in\nall caches and the base; bits are those at the end of a chunk.\n"
      "Tasks, each a text that is read and packed before its questions are asked, one by one "
      "(--ask after):\n"
      "  passcode   passcodes spread over the text of -f\n"
      "  multikey   many keys of the same few words, some of them asked\n"
      "  variables  VAR A = 12345, later VAR B = VAR A, later VAR C = VAR B: the value of C\n"
      "  words      lists of words, the one that occurs most often in each\n\n"
      "Codecs of others among the baselines: kivi-B (B: 2, 4), turboquant-B (2, 3, 4), think-R, "
      "mustafar-R\n"
      "(R pruned, 0 to 1) and llama.cpp's q8_0-rows, q5_1-rows, q4_0-rows. The plugin codes and "
      "decodes rows,\n"
      "with the sinks and the window of spark-0.5-i5 or as --kv-sinks and --kv-window say; "
      "bits are the\n"
      "codec's, memory and speed are not.\n\n"
      "Examples\n"
      "  sparkv eval -m model.gguf --requantize-f32\n"
      "  sparkv eval -m model.gguf -f book.txt -c 4096 --baselines q8_0,q5_1,q8_0/q4_0 --json\n"
      "  sparkv eval -m model.gguf --requantize-f32 --baselines q4_0,kivi-4,turboquant-4 "
      "--questions 0\n"
      "  sparkv eval -m model.gguf -f book.txt --questions 0 "
      "--kv-preset exact+snapkv:512,exact+snapkv:128,balanced+snapkv:512\n"
      "  sparkv eval -m model.gguf -f book.txt --tasks passcode,variables --task-words 12000 "
      "--resume so-far.json");
  return [=] { return Eval(*settings); };
}

}  // namespace sparkv

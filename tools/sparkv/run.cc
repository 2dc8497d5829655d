#include "run.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "kv_options.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

using Words = std::vector<std::string>;

struct Settings {
  KvOptions kv;
  bool json = false;
};

bool HasFlag(const Words& words, std::initializer_list<const char*> names) {
  return std::any_of(words.begin(), words.end(), [&](const std::string& word) {
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return word == name; });
  });
}

// The word after the last of `names`, as llama.cpp takes it; "" when there is none.
std::string FlagValue(const Words& words, std::initializer_list<const char*> names) {
  for (size_t i = words.size(); i-- > 1;) {
    if (HasFlag({words[i - 1]}, names)) return words[i];
  }
  return "";
}

bool ModelIsRemote(const Words& host) {
  return getenv("LLAMA_ARG_HF_REPO") ||
         HasFlag(host, {"-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "-dr", "--docker-repo"});
}

void CheckModel(const Words& host, const Cache& cache) {
  std::string model = FlagValue(host, {"-m", "--model"});
  if (!model.empty()) RequireModel(model);
  const char* variable = getenv("LLAMA_ARG_MODEL");
  if (model.empty() && variable == nullptr && !ModelIsRemote(host))
    throw Error(kUsage, "-m: no model given");
  if (cache.calibrated_for.empty() || ModelIsRemote(host)) return;  // the plugin compares, too
  if (model.empty()) model = variable;
  RequireModel(model);
  CheckCalibration(cache, ReadModelShape(model));
}

Cache CacheOf(const KvOptions& kv) {
  const char* preset = getenv("SPARKV_PRESET");
  Cache cache = MakeCache(kv.preset.empty() && preset ? preset : kv.preset, kv);
  // Unless it was asked for by an option, the plugin reads the preset from where it comes: the
  // user's environment.
  if (kv.preset.empty() && cache.packed) cache.environment.erase(cache.environment.begin());
  return cache;
}

Command HostCommand(const std::string& program, const Cache& cache, const Words& before,
                    const Words& host) {
  Command command{FindProgram(program), cache.Flags(), ChildEnvironment(cache, true)};
  command.args.insert(command.args.end(), before.begin(), before.end());
  command.args.insert(command.args.end(), host.begin(), host.end());
  return command;
}

// Lets the program read its options and stop there: it reports what it cannot read with exit code
// 1, as it reports a failed run, and a wrong option is wrong usage.
void CheckOptions(Command command, const Words& host) {
  if (ModelIsRemote(host)) return;  // would be fetched to answer --help
  command.args.push_back("--help");
  Child child(command, Child::Output::kCapture);
  child.Drain(nullptr, nullptr);
  if (child.Wait() == 0) return;
  const std::string name = std::filesystem::path(command.program).filename().string();
  for (const auto& line : child.log()) {
    if (const size_t at = line.find("error"); at != std::string::npos)
      throw Error(kUsage, fmt::format("{}: {}", name, line.substr(at)));
  }
  for (const auto& line : child.log()) fmt::print(stderr, "{}\n", line);
  throw Error(kUsage, fmt::format("{}: refuses its options", name));
}

// The plugin's own report, or null when there is none (llama.cpp without sparkv, or a host that
// died).
nlohmann::json ReadStats(const std::string& path) {
  if (!std::filesystem::exists(path)) return nullptr;
  return nlohmann::json::parse(ReadFile(path), nullptr, false);
}

int RunJson(Command command, const Cache& cache) {
  const TemporaryFolder folder;
  if (cache.packed) command.environment.push_back("SPARKV_STATS=" + folder.File("stats.json"));
  std::string text;
  RunToEnd(
      command, [&](const std::string& line) { text += line + "\n"; }, nullptr);
  const auto trim = [&] {
    while (!text.empty() && isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
  };
  trim();
  if (constexpr std::string_view kEnd = "[end of text]"; text.ends_with(kEnd)) {
    text.resize(text.size() - kEnd.size());  // the program's remark, not the model's
    trim();
  }
  PrintJson({{"text", text},
             {"cache", cache.name},
             {"command", command.args},
             {"stats", ReadStats(folder.File("stats.json"))}});
  return kOk;
}

int Run(const Settings& settings, const Words& host) {
  const Cache cache = CacheOf(settings.kv);
  CheckModel(host, cache);
  const bool one_shot = HasFlag(host, {"-p", "--prompt", "-f", "--file", "-bf", "--binary-file"});
  if (settings.json && !one_shot) throw Error(kUsage, "--json: needs a prompt (-p or -f)");
  Words before;
  if (one_shot) {
    before.push_back("--no-display-prompt");
    // The chat template for one turn, unless the user decides about conversation mode.
    if (!HasFlag(host, {"-cnv", "--conversation", "-no-cnv", "--no-conversation", "-st",
                        "--single-turn"})) {
      before.push_back("-st");
    }
  }
  const Command command =
      HostCommand(one_shot ? "llama-completion" : "llama-cli", cache, before, host);
  CheckOptions(command, host);
  if (settings.json) return RunJson(command, cache);
  Child child(command, Child::Output::kInherit);
  const int code = child.Wait();
  if (code == 0) return kOk;
  throw Error(kRuntime, Describe(command.program, code));
}

int Serve(const Settings& settings, const Words& host) {
  const Cache cache = CacheOf(settings.kv);
  CheckModel(host, cache);
  Words before;
  if (!HasFlag(host, {"--host"}) && !getenv("LLAMA_ARG_HOST")) before = {"--host", "127.0.0.1"};
  Command command = HostCommand("llama-server", cache, before, host);
  CheckOptions(command, host);
  // A slot file holds f16 rows only; the weights that pack them again live beside it.
  const std::string slots = FlagValue(host, {"--slot-save-path"});
  if (cache.packed && !slots.empty() && !getenv("SPARKV_WEIGHTS")) {
    command.environment.push_back("SPARKV_WEIGHTS=" +
                                  (std::filesystem::path(slots) / "weights.sparkv").string());
  }
  if (settings.json) {
    nlohmann::json environment = nlohmann::json::array();
    for (const auto& entry : command.environment) {
      if (entry.rfind("SPARKV_", 0) == 0 || entry.rfind("GGML_BACKEND_PATH=", 0) == 0)
        environment.push_back(entry);
    }
    fmt::print("{}\n", nlohmann::json{{"program", command.program},
                                      {"args", command.args},
                                      {"environment", environment}}
                           .dump());
    std::fflush(stdout);
  }
  std::vector<char*> argv = {command.program.data()};
  for (auto& word : command.args) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<char*> envp;
  for (auto& entry : command.environment) envp.push_back(entry.data());
  envp.push_back(nullptr);
  execve(command.program.c_str(), argv.data(), envp.data());
  throw Error(kRuntime, fmt::format("{}: cannot be started: {}", command.program, strerror(errno)));
}

std::function<int()> Add(CLI::App* app, const Words* host,
                         int (*action)(const Settings&, const Words&), const char* json_help) {
  auto settings = std::make_shared<Settings>();
  AddKvOptions(app, &settings->kv);
  app->add_flag("--json", settings->json, json_help);
  return [=] { return action(*settings, *host); };
}

}  // namespace

SplitArguments PartArguments(const Words& arguments) {
  SplitArguments parts;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    if (word == "--") {
      parts.host.insert(parts.host.end(), arguments.begin() + i + 1, arguments.end());
      break;
    }
    if (word == "--json" || word == "--help" || word == "-h") {
      parts.own.push_back(word);
    } else if (word.rfind("--kv-", 0) == 0 && word != "--kv-unified" && word != "--kv-offload") {
      parts.own.push_back(word);
      if (word.find('=') == std::string::npos && i + 1 < arguments.size())
        parts.own.push_back(arguments[++i]);
    } else {
      parts.host.push_back(word);
    }
  }
  return parts;
}

std::function<int()> AddRun(CLI::App* app, const Words* host) {
  app->footer(
      "llama.cpp's own options (go through unchanged; llama-completion --help lists all)\n"
      "  -m FILE  -c CTX  -t THREADS  -n TOKENS  -p PROMPT  -f FILE  -s SEED  --temp T  -sys TEXT  "
      "...\n"
      "With -p or -f: one answer on stdout (llama-completion). Without: a chat (llama-cli).\n"
      "An instruct model gets its chat template; -no-cnv gives it the bare text.\n\n"
      "Examples\n"
      "  sparkv run -m model.gguf -p 'Why is the sky blue?' -n 100\n"
      "  sparkv run -m model.gguf -f report.txt -c 8192 --kv-preset spark-0.5-i8 --json\n"
      "  sparkv run -m model.gguf                                # chat\n"
      "  sparkv run -m model.gguf --kv-preset f16 -p 'Hello'     # the same without sparkv");
  return Add(app, host, Run,
             "one JSON object on stdout: text, cache, command, statistics of the cache");
}

std::function<int()> AddServe(CLI::App* app, const Words* host) {
  app->footer(
      "llama-server's own options go through unchanged (llama-server --help lists all). It listens "
      "on 127.0.0.1\n"
      "unless --host says otherwise. With --slot-save-path DIR the channel weights are kept in\n"
      "DIR/weights.sparkv, so that a fresh server takes saved slots back as packed rows.\n\n"
      "Examples\n"
      "  sparkv serve -m model.gguf -c 16384 -np 4 --port 8080\n"
      "  sparkv serve -m model.gguf --slot-save-path slots/ --kv-ratio 0.6");
  return Add(app, host, Serve,
             "print the command and its environment as one JSON line before it starts");
}

}  // namespace sparkv

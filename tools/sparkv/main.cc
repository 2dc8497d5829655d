// The command `sparkv`: its sub-commands and how their ends become exit codes.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "bench.h"
#include "calibrate.h"
#include "check.h"
#include "completion.h"
#include "eval.h"
#include "fit.h"
#include "frontier.h"
#include "inspect.h"
#include "report.h"
#include "run.h"
#include "sparkv/sparkv.h"

namespace sparkv {
namespace {

// llama.cpp has short options of two letters; CLI11 knows one letter only.
void SpellOut(std::vector<std::string>* words) {
  std::replace(words->begin(), words->end(), std::string("-ub"), std::string("--ubatch-size"));
}

int Main(std::vector<std::string> words) {
  CLI::App app("Runs llama.cpp with a packed KV cache, and measures what that costs and saves.",
               "sparkv");
  app.set_version_flag("--version", fmt::format("sparkv {} (row format {})", sparkv_version(),
                                                SPARKV_FORMAT_VERSION));
  app.require_subcommand(0, 1);
  std::string shell;
  app.add_option("--completion", shell, "print a completion script for bash, zsh or fish")
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  app.footer(
      "Examples\n"
      "  sparkv run -m model.gguf -p 'Why is the sky blue?' -n 100\n"
      "  sparkv serve -m model.gguf -c 16384 -np 4\n"
      "  sparkv inspect -m model.gguf -c 32768\n"
      "  sparkv fit -m model.gguf --memory 4GiB\n"
      "  source <(sparkv --completion bash)\n\n"
      "Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong "
      "usage.\n"
      "SPARKV_LLAMA_BIN names the folder of the llama.cpp programs, SPARKV_PLUGIN the plugin, "
      "where they are not beside\n"
      "this program.");

  SplitArguments parts;
  if (!words.empty() && (words[0] == "run" || words[0] == "serve")) {
    parts = PartArguments({words.begin() + 1, words.end()});
    parts.own.insert(parts.own.begin(), words[0]);
  } else {
    SpellOut(&words);
    parts.own = words;
  }

  std::vector<std::pair<CLI::App*, std::function<int()>>> commands;
  const auto add = [&](const char* name, const char* description, const auto& fill) {
    CLI::App* command = app.add_subcommand(name, description);
    commands.push_back({command, fill(command)});
  };
  add("run", "one answer or a chat",
      [&](CLI::App* command) { return AddRun(command, &parts.host); });
  add("serve", "llama-server with the packed cache",
      [&](CLI::App* command) { return AddServe(command, &parts.host); });
  add("bench", "speed beside llama.cpp's own caches", AddBench);
  add("inspect", "bytes of a preset for a model; pictures of what was kept", AddInspect);
  add("fit", "the longest context that a memory holds, by preset", AddFit);
  add("check", "does the model break under the packed cache, and what would it stand", AddCheck);
  add("calibrate", "what a model does with its cache, as a file for --kv-calibration",
      AddCalibrate);
  add("eval", "perplexity, KL divergence, agreement, retrieval tasks", AddEval);
  add("report", "an evaluation as a page with its frontier, and as CSV", AddReport);

  std::reverse(parts.own.begin(), parts.own.end());  // as CLI11 wants it
  try {
    app.parse(parts.own);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    throw Error(kUsage, error.what());
  }
  if (!shell.empty()) {
    fmt::print("{}", CompletionScript(app, shell));
    return kOk;
  }
  for (const auto& [command, action] : commands) {
    if (command->parsed()) return action();
  }
  throw Error(
      kUsage,
      "no sub-command: one of run, serve, bench, inspect, fit, check, calibrate, eval, report "
      "(--help explains)");
}

}  // namespace
}  // namespace sparkv

int main(int argc, char** argv) {
  try {
    const int code = sparkv::Main({argv + 1, argv + argc});
    // What a full disk has not taken must not look like success.
    if (std::fflush(stdout) != 0)
      throw sparkv::Error(sparkv::kRuntime, fmt::format("stdout: {}", std::strerror(errno)));
    return code;
  } catch (const sparkv::Error& error) {
    fmt::print(stderr, "sparkv: {}\n", error.what());
    return error.code();
  } catch (const std::exception& error) {
    fmt::print(stderr, "sparkv: {}\n", error.what());
    return sparkv::kRuntime;
  }
}

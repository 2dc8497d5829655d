#include "launch.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "report.h"

namespace sparkv {
namespace {

namespace fs = std::filesystem;

fs::path OwnFolder() {
  std::error_code failed;
  const fs::path self = fs::read_symlink("/proc/self/exe", failed);
  return failed ? fs::path(".") : self.parent_path();
}

std::string Variable(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

bool IsProgram(const fs::path& path) {
  return fs::is_regular_file(path) && access(path.c_str(), X_OK) == 0;
}

std::string Name(const std::string& entry) { return entry.substr(0, entry.find('=')); }

}  // namespace

std::string FindProgram(const std::string& name) {
  if (const std::string folder = Variable("SPARKV_LLAMA_BIN"); !folder.empty()) {
    const fs::path path = fs::path(folder) / name;
    if (!IsProgram(path))
      throw Error(kRuntime,
                  fmt::format("{}: no such program (SPARKV_LLAMA_BIN={})", path.string(), folder));
    return path;
  }
  const fs::path beside = OwnFolder() / name;
  if (IsProgram(beside)) return beside;
  if (const std::string found = FindOnPath(name); !found.empty()) return found;
  throw Error(
      kRuntime,
      fmt::format("{}: not found, nor on PATH; build it with 'make build' or set SPARKV_LLAMA_BIN",
                  beside.string()));
}

std::string FindOnPath(const std::string& name) {
  std::istringstream path(Variable("PATH"));
  for (std::string folder; std::getline(path, folder, ':');) {
    if (!folder.empty() && IsProgram(fs::path(folder) / name)) return fs::path(folder) / name;
  }
  return "";
}

std::string FindPlugin() {
  const std::string given = Variable("SPARKV_PLUGIN");
  const fs::path path =
      given.empty() ? OwnFolder().parent_path() / "lib" / "libggml-sparkv.so" : fs::path(given);
  if (!fs::is_regular_file(path)) {
    throw Error(kRuntime,
                fmt::format("{}: plugin not found; build it with 'make build' or set SPARKV_PLUGIN",
                            path.string()));
  }
  return fs::absolute(path);
}

std::string DefaultModel() {
  if (const std::string given = Variable("LLAMA_ARG_MODEL"); !given.empty()) return given;
  const fs::path path = OwnFolder().parent_path() / "models" / "smollm2-135m-instruct-q4_1.gguf";
  return fs::is_regular_file(path) ? path.string() : "";
}

void RequireModel(const std::string& path) {
  if (path.empty()) throw Error(kUsage, "-m: no model given");
  if (!fs::is_regular_file(path)) throw Error(kRuntime, fmt::format("{}: model not found", path));
  if (access(path.c_str(), R_OK) != 0)
    throw Error(kRuntime, fmt::format("{}: {}", path, strerror(errno)));
}

std::vector<std::string> ChildEnvironment(const Cache& cache, bool keep_settings) {
  std::vector<std::string> entries;
  const auto overridden = [&](const std::string& name) {
    return std::any_of(cache.environment.begin(), cache.environment.end(),
                       [&](const std::string& entry) { return Name(entry) == name; });
  };
  bool has_policy = false;
  for (char** entry = environ; *entry; ++entry) {
    const std::string name = Name(*entry);
    if (name == "GGML_BACKEND_PATH" || name == "SPARKV_LLAMA_BIN" || name == "SPARKV_PLUGIN")
      continue;
    if (name.rfind("SPARKV_", 0) == 0 && (!keep_settings || overridden(name))) continue;
    has_policy |= name == "OMP_WAIT_POLICY";
    entries.push_back(*entry);
  }
  // Spinning OpenMP threads would fight the plugin's own; the same for every cache keeps
  // comparisons fair.
  if (!has_policy) entries.push_back("OMP_WAIT_POLICY=passive");
  if (cache.packed) {
    entries.push_back("GGML_BACKEND_PATH=" + FindPlugin());
    entries.insert(entries.end(), cache.environment.begin(), cache.environment.end());
  }
  return entries;
}

Command MakeCommand(const std::string& program, const Cache& cache,
                    const std::vector<std::string>& args) {
  Command command{FindProgram(program), cache.Flags(), ChildEnvironment(cache, false)};
  command.args.insert(command.args.end(), args.begin(), args.end());
  return command;
}

}  // namespace sparkv

// `sparkv run` and `sparkv serve`: a llama.cpp program with the plugin in it; its own flags go
// through unchanged.
#ifndef SPARKV_TOOLS_RUN_H_
#define SPARKV_TOOLS_RUN_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

namespace sparkv {

// What the user typed after the sub-command, parted by owner.
struct SplitArguments {
  std::vector<std::string> own;   // --kv-*, --json, --help
  std::vector<std::string> host;  // everything else, in order; all of it after "--"
};
SplitArguments PartArguments(const std::vector<std::string>& arguments);

// Each adds its options to `app` and returns what to do after parsing. `host` must outlive the
// call.
std::function<int()> AddRun(CLI::App* app, const std::vector<std::string>* host);
std::function<int()> AddServe(CLI::App* app, const std::vector<std::string>* host);

}  // namespace sparkv

#endif

// Finds the llama.cpp programs and the plugin, and makes the environment that connects them.
#ifndef SPARKV_TOOLS_LAUNCH_H_
#define SPARKV_TOOLS_LAUNCH_H_

#include <string>
#include <vector>

#include "child.h"
#include "kv_options.h"

namespace sparkv {

// $SPARKV_LLAMA_BIN, then beside this program, then PATH. Throws naming what was looked for.
std::string FindProgram(const std::string& name);
// On PATH alone; "" where it is not there.
std::string FindOnPath(const std::string& name);
// $SPARKV_PLUGIN, then ../lib/libggml-sparkv.so beside this program.
std::string FindPlugin();
// $LLAMA_ARG_MODEL, then the model that `make build` put into ../models, else "".
std::string DefaultModel();
void RequireModel(const std::string& path);

// This process's environment without the variables of sparkv and the plugin path, plus what `cache`
// needs. `keep_settings`: SPARKV_* variables of the user stay where `cache` does not set them.
std::vector<std::string> ChildEnvironment(const Cache& cache, bool keep_settings);

// `program` on `cache`: the flags of the cache, then `args`.
Command MakeCommand(const std::string& program, const Cache& cache,
                    const std::vector<std::string>& args);

}  // namespace sparkv

#endif

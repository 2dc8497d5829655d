// `sparkv eval`: how far a packed cache is from a dense one, beside llama.cpp's own quantised
// caches in the same run.
#ifndef SPARKV_TOOLS_EVAL_H_
#define SPARKV_TOOLS_EVAL_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddEval(CLI::App* app);

}  // namespace sparkv

#endif

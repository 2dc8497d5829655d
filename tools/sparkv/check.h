// `sparkv check`: does a model break under a packed cache, and if so, what would it stand?
#ifndef SPARKV_TOOLS_CHECK_H_
#define SPARKV_TOOLS_CHECK_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddCheck(CLI::App* app);

}  // namespace sparkv

#endif

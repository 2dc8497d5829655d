// `sparkv inspect`: what a preset makes of a model's cache, and pictures of what it kept.
#ifndef SPARKV_TOOLS_INSPECT_H_
#define SPARKV_TOOLS_INSPECT_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddInspect(CLI::App* app);

}  // namespace sparkv

#endif

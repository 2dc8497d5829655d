// `sparkv fit`: the longest context whose KV cache fits into a memory, for every cache.
#ifndef SPARKV_TOOLS_FIT_H_
#define SPARKV_TOOLS_FIT_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddFit(CLI::App* app);

}  // namespace sparkv

#endif

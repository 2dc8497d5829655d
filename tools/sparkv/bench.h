// `sparkv bench`: llama-bench on several caches, taking turns, so that all see the same machine.
#ifndef SPARKV_TOOLS_BENCH_H_
#define SPARKV_TOOLS_BENCH_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddBench(CLI::App* app);

}  // namespace sparkv

#endif

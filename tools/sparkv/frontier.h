// `sparkv report`: what `sparkv eval --json` found, as a page with the frontier of bytes against
// quality, and as CSV.
#ifndef SPARKV_TOOLS_FRONTIER_H_
#define SPARKV_TOOLS_FRONTIER_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddReport(CLI::App* app);

}  // namespace sparkv

#endif

// `sparkv calibrate`: what a model does with its cache, measured once and kept in a file.
#ifndef SPARKV_TOOLS_CALIBRATE_H_
#define SPARKV_TOOLS_CALIBRATE_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace sparkv {

std::function<int()> AddCalibrate(CLI::App* app);

}  // namespace sparkv

#endif

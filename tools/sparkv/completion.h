// `sparkv --completion SHELL`: a script for the shell, made from the options themselves.
#ifndef SPARKV_TOOLS_COMPLETION_H_
#define SPARKV_TOOLS_COMPLETION_H_

#include <CLI/CLI.hpp>
#include <string>

namespace sparkv {

// `shell`: bash, zsh or fish.
std::string CompletionScript(const CLI::App& app, const std::string& shell);

}  // namespace sparkv

#endif

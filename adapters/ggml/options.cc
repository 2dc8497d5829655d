#include "options.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "report.h"

namespace sparkv {
namespace {

constexpr char kPrefix[] = "SPARKV_";
// EVICT first: it changes what a preset says of WINDOW and RECENT, and what is set stays.
constexpr const char* kParameters[] = {"EVICT",       "RATIO",   "RECOVER", "GROUP",   "KEPT",
                                       "VALUES",      "SINKS",   "WINDOW",  "OBSERVE", "SEAL",
                                       "SIMD",        "THREADS", "LAYERS",  "PROTECT", "BUDGET",
                                       "SENSITIVITY", "RECENT",  "BASELINE"};
constexpr const char* kOthers[] = {"PRESET",      "LOG",       "STATS",     "WEIGHTS", "SALIENCY",
                                   "CALIBRATION", "CALIBRATE", "ALLOW_RPC", "ERRORS"};
constexpr const char* kLevels[] = {"off", "error", "warn", "info", "debug"};

std::atomic<LogLevel> log_level{LogLevel::kInfo};

std::string Env(const char* name) {
  const char* value = std::getenv((std::string(kPrefix) + name).c_str());
  return value ? value : "";
}

std::string UnknownVariable() {
  for (char** entry = environ; *entry; ++entry) {
    if (std::strncmp(*entry, kPrefix, std::strlen(kPrefix)) != 0) continue;
    const std::string name(*entry + std::strlen(kPrefix),
                           std::strcspn(*entry, "=") - std::strlen(kPrefix));
    const auto is_name = [&](const char* known) { return name == known; };
    if (std::any_of(std::begin(kParameters), std::end(kParameters), is_name)) continue;
    if (std::any_of(std::begin(kOthers), std::end(kOthers), is_name)) continue;
    return std::string("unknown environment variable ") + kPrefix + name;
  }
  return "";
}

// Takes ":number" off the end of `text`; false when there is none.
bool TakeNumber(std::string* text, int* number) {
  const size_t colon = text->rfind(':');
  if (colon == std::string::npos || colon + 1 == text->size() || text->size() - colon > 6)
    return false;
  const std::string digits = text->substr(colon + 1);
  if (!std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c); }))
    return false;
  *number = std::atoi(digits.c_str());
  text->resize(colon);
  return true;
}

void ReadSaliency(Options* options) {
  options->saliency = Env("SALIENCY");
  int last = 0, before = 0;
  if (!TakeNumber(&options->saliency, &last)) return;
  if (TakeNumber(&options->saliency, &before)) {
    options->saliency_layer = before;
    options->saliency_head = last;
  } else {
    options->saliency_layer = last;
  }
}

}  // namespace

std::string ReadOptions(Options* options) {
  if (std::string unknown = UnknownVariable(); !unknown.empty()) return unknown;

  const std::string level = Env("LOG");
  if (!level.empty()) {
    const auto* found = std::find(std::begin(kLevels), std::end(kLevels), level);
    if (found == std::end(kLevels))
      return "SPARKV_LOG=" + level + ": not one of off, error, warn, info, debug";
    options->log = static_cast<LogLevel>(found - std::begin(kLevels));
  }

  sparkv_error error = {};
  const std::string preset = Env("PRESET");
  options->config.struct_size = sizeof(options->config);
  if (sparkv_config_preset(&options->config, preset.c_str(), &error) != SPARKV_OK) {
    return "SPARKV_PRESET=" + preset + ": " + error.text;
  }
  for (const char* parameter : kParameters) {
    const std::string value = Env(parameter);
    if (value.empty()) continue;
    std::string key = parameter;
    std::transform(key.begin(), key.end(), key.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    if (sparkv_config_set(&options->config, key.c_str(), value.c_str(), &error) != SPARKV_OK) {
      return std::string(kPrefix) + parameter + "=" + value + ": " + error.text;
    }
  }

  const std::string allow_rpc = Env("ALLOW_RPC");
  if (!allow_rpc.empty() && allow_rpc != "0" && allow_rpc != "1")
    return "SPARKV_ALLOW_RPC=" + allow_rpc + ": not 0 or 1";
  options->allow_rpc = allow_rpc == "1";
  const std::string errors = Env("ERRORS");
  if (!errors.empty() && errors != "0" && errors != "1")
    return "SPARKV_ERRORS=" + errors + ": not 0 or 1";
  options->errors = errors == "1";
  options->stats = Env("STATS");
  options->weights = Env("WEIGHTS");
  options->calibrate = Env("CALIBRATE");
  // Both are written at the end: a model that was named by mistake would be lost.
  if (!MayReplace(options->weights, "sparkvw"))
    return "SPARKV_WEIGHTS=" + options->weights + ": a file that holds no weights of sparkv";
  if (!MayReplace(options->calibrate, "sparkvc"))
    return "SPARKV_CALIBRATE=" + options->calibrate + ": a file that holds no calibration";
  ReadSaliency(options);
  const std::string calibration = Env("CALIBRATION");
  if (calibration.empty()) return "";
  if (!options->calibrate.empty())
    return "SPARKV_CALIBRATE=" + options->calibrate + ": does not go with SPARKV_CALIBRATION";
  std::string reason = "no such file";
  if (!ReadFile(calibration, &options->calibration, &reason))
    return "SPARKV_CALIBRATION=" + calibration + ": " + reason;
  if (sparkv_config_calibration(&options->config, options->calibration.data(),
                                options->calibration.size(), &error) != SPARKV_OK) {
    return "SPARKV_CALIBRATION=" + calibration + ": " + error.text;
  }
  return "";
}

void SetLogLevel(LogLevel level) { log_level = level; }

void Log(LogLevel level, const char* format, ...) {
  if (level > log_level.load()) return;
  char line[4096];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof(line), format, args);
  va_end(args);
  const char* kind = level == LogLevel::kError  ? "error: "
                     : level == LogLevel::kWarn ? "warning: "
                                                : "";
  std::fprintf(stderr, "sparkv: %s%s\n", kind,
               line);  // one call: lines of other threads do not mix in
}

}  // namespace sparkv

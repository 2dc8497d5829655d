// What the environment asks for, read once at load. docs and names: README, "Plugin".
#pragma once

#include <string>

#include "sparkv/sparkv.h"

namespace sparkv {

enum class LogLevel { kOff, kError, kWarn, kInfo, kDebug };

struct Options {
  sparkv_config config = {};
  LogLevel log = LogLevel::kInfo;
  std::string stats;        // SPARKV_STATS, "" = none
  std::string weights;      // SPARKV_WEIGHTS
  std::string calibration;  // what the file SPARKV_CALIBRATION holds, "" = none
  std::string calibrate;    // SPARKV_CALIBRATE, a file to write
  bool errors = false;      // SPARKV_ERRORS
  std::string saliency;     // SPARKV_SALIENCY without its :layer:head
  int saliency_layer = 0;
  int saliency_head = 0;
  bool allow_rpc = false;
};

// Returns "" or one line that names the variable and the value at fault. An unset or empty variable
// is its default.
std::string ReadOptions(Options* options);

// One line on stderr, "sparkv: ...". Not the host's log: llama-bench drops that, and an error must
// be seen.
void Log(LogLevel level, const char* format, ...) __attribute__((format(printf, 2, 3)));
void SetLogLevel(LogLevel level);

}  // namespace sparkv

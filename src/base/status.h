// Errors as values. A Status names the field and the value at fault in one line.
#pragma once

#include <cstdio>
#include <string>
#include <utility>

#include "sparkv/sparkv.h"

namespace sparkv {

struct [[nodiscard]] Status {
  sparkv_status code = SPARKV_OK;
  std::string text;

  bool ok() const { return code == SPARKV_OK; }
  static Status Ok() { return {}; }
  static Status Invalid(std::string text) { return {SPARKV_INVALID, std::move(text)}; }
  static Status NoMemory(std::string text) { return {SPARKV_NO_MEMORY, std::move(text)}; }
  static Status Unsupported(std::string text) { return {SPARKV_UNSUPPORTED, std::move(text)}; }
  static Status Corrupt(std::string text) { return {SPARKV_CORRUPT, std::move(text)}; }

  // Copies the text into the caller's struct (which may be NULL) and returns the code.
  sparkv_status Report(sparkv_error* error) const {
    if (error != nullptr) std::snprintf(error->text, sizeof(error->text), "%s", text.c_str());
    return code;
  }
};

}  // namespace sparkv

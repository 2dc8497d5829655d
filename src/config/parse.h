// Numbers and texts of settings.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>
#include <string_view>
#include <system_error>

#include "base/status.h"

namespace sparkv {

// The whole of `text` as a number; "inf" and "nan" are numbers to from_chars and fail the range
// instead.
enum class Parse { kOk, kNotANumber, kOutOfRange };
template <typename Number, typename... Format>
Parse ParseNumber(std::string_view text, Number* number, Format... format) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *number, format...);
  if (stop != end || error == std::errc::invalid_argument) return Parse::kNotANumber;
  return error == std::errc() ? Parse::kOk : Parse::kOutOfRange;
}

inline std::string Outside(std::string_view key, std::string_view value, std::string_view low,
                           std::string_view high) {
  return std::string(key) + ": " + std::string(value) + " is outside [" + std::string(low) + ", " +
         std::string(high) + "]";
}

// Calls body(entry) for each entry of a list with commas, until one fails.
template <typename Body>
Status ForEachEntry(std::string_view list, Body&& body) {
  for (size_t at = 0; !list.empty() && at <= list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    if (Status s = body(list.substr(at, end - at)); !s.ok()) return s;
    at = end + 1;
  }
  return Status::Ok();
}

// *text as it was when `value` does not fit.
template <size_t kSize>
Status SetText(std::string_view key, std::string_view value, char (*text)[kSize]) {
  if (value.size() >= kSize) {
    return Status::Invalid(std::string(key) + ": " + std::to_string(value.size()) +
                           " characters, at most " + std::to_string(kSize - 1) + " fit");
  }
  std::memset(*text, 0, kSize);
  std::copy(value.begin(), value.end(), *text);
  return Status::Ok();
}

// A text inside a C struct, which need not end.
template <size_t kSize>
std::string_view TextOf(const char (&text)[kSize]) {
  return {text, strnlen(text, kSize)};
}

}  // namespace sparkv

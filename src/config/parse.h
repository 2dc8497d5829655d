// Numbers and texts of settings.
#pragma once

#include <charconv>
#include <cstring>
#include <string>
#include <string_view>
#include <system_error>

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

// A text inside a C struct, which need not end.
template <size_t kSize>
std::string_view TextOf(const char (&text)[kSize]) {
  return {text, strnlen(text, kSize)};
}

}  // namespace sparkv

#include "report.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

namespace sparkv {

namespace fs = std::filesystem;

namespace {

// Devices and pipes are written to; a new file must never take their place.
bool Replaceable(const std::string& path) {
  std::error_code failed;
  const fs::file_type type = fs::status(path, failed).type();
  return type == fs::file_type::regular || type == fs::file_type::not_found;
}

// A link stays a link: what it names is replaced.
std::string Target(const std::string& path) {
  std::error_code failed;
  const fs::path target = fs::weakly_canonical(path, failed);
  return failed ? path : target.string();
}

}  // namespace

void Note(const std::string& text) { fmt::print(stderr, "sparkv: {}\n", text); }

void Progress::Update(const std::string& text) {
  using namespace std::chrono_literals;
  const auto now = std::chrono::steady_clock::now();
  const bool terminal = isatty(STDERR_FILENO);
  if (shown_ && now - last_ < (terminal ? 100ms : 5000ms)) return;
  if (terminal) {
    fmt::print(stderr, "\r\x1b[K{}: {}", label_, text);
  } else {
    fmt::print(stderr, "{}: {}\n", label_, text);
  }
  std::fflush(stderr);
  last_ = now;
  shown_ = true;
}

void Progress::Done() {
  if (shown_ && isatty(STDERR_FILENO)) fmt::print(stderr, "\r\x1b[K");
  shown_ = false;
}

std::vector<size_t> Table::Widths() const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  return widths;
}

void Table::Print() const {
  const auto widths = Widths();
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += i == 0 ? fmt::format("{:<{}}", row[i], widths[i])
                     : fmt::format("  {:>{}}", row[i], widths[i]);
    }
    fmt::print("{}\n", line);
  }
}

void Table::PrintMarkdown() const {
  const auto widths = Widths();
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line = "|";
    for (size_t i = 0; i < rows_[r].size(); ++i) {
      line += i == 0 ? fmt::format(" {:<{}} |", rows_[r][i], widths[i])
                     : fmt::format(" {:>{}} |", rows_[r][i], widths[i]);
    }
    fmt::print("{}\n", line);
    if (r > 0) continue;
    line = "|";
    for (size_t i = 0; i < widths.size(); ++i) {
      line += i == 0 ? fmt::format(" {:-<{}} |", "", widths[i])
                     : fmt::format(" {:->{}}: |", "", widths[i] - 1);
    }
    fmt::print("{}\n", line);
  }
}

void PrintJson(const nlohmann::json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
}

nlohmann::json Machine() {
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    cpu = line.substr(std::min(line.size(), line.find(':') + 2));
    break;
  }
  double load = 0;
  if (getloadavg(&load, 1) != 1) load = -1;
  return {{"cpu", cpu}, {"cores", std::thread::hardware_concurrency()}, {"load", load}};
}

std::string Printable(std::string text) {
  for (char& c : text) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return text;
}

std::string ReadFile(const std::string& path) {
  // A stream reads a directory as nothing, and some devices never end.
  std::error_code failed;
  const fs::file_type type = fs::status(path, failed).type();
  if (type == fs::file_type::directory || type == fs::file_type::character)
    throw Error(kRuntime, fmt::format("{}: cannot be read: not a file", path));
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file || text.bad()) throw Error(kRuntime, fmt::format("{}: cannot be read", path));
  return std::move(text).str();
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file)
    throw Error(kRuntime, fmt::format("{}: cannot be written: {}", path, std::strerror(errno)));
}

void ReplaceFile(const std::string& path, const std::string& text) {
  if (!Replaceable(path)) return WriteFile(path, text);
  const std::string target = Target(path), written = fmt::format("{}.{}.partial", target, getpid());
  std::error_code failed;
  try {
    WriteFile(written, text);
    fs::rename(written, target);
  } catch (const std::exception&) {
    const int why = errno;
    fs::remove(written, failed);
    throw Error(kRuntime, fmt::format("{}: cannot be written: {}", path, std::strerror(why)));
  }
}

void RequirePlace(const std::string& path) {
  std::error_code failed;
  const std::string target = Target(path), folder = fs::path(target).parent_path();
  if (fs::is_directory(path, failed))
    errno = EISDIR;
  else if ((!fs::exists(path, failed) || access(path.c_str(), W_OK) == 0) &&
           (!Replaceable(path) || access(folder.empty() ? "." : folder.c_str(), W_OK) == 0))
    return;
  throw Error(kRuntime, fmt::format("{}: cannot be written: {}", path, std::strerror(errno)));
}

}  // namespace sparkv

// What the command says: errors with an exit code, tables on stdout, progress and notes on stderr.
#ifndef SPARKV_TOOLS_REPORT_H_
#define SPARKV_TOOLS_REPORT_H_

#include <chrono>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace sparkv {

enum ExitCode { kOk = 0, kRuntime = 1, kUsage = 2 };

// Ends the command: one line on stderr that names the field and the value, and an exit code.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

void Note(const std::string& text);

// A line that is rewritten on a terminal; elsewhere one plain line per new text, at most one per
// five seconds and label.
class Progress {
 public:
  explicit Progress(std::string label) : label_(std::move(label)) {}
  ~Progress() { Done(); }
  void Update(const std::string& text);
  void Done();

 private:
  std::string label_;
  std::chrono::steady_clock::time_point last_{};
  bool shown_ = false;
};

// Columns as wide as their widest cell; the first column is left-aligned, the others right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void Print() const;
  void PrintMarkdown() const;

 private:
  std::vector<size_t> Widths() const;
  std::vector<std::vector<std::string>> rows_;
};

void PrintJson(const nlohmann::json& json);

// {"cpu", "cores", "load"}: the load is that of the last minute before the command began to work.
nlohmann::json Machine();

// Text from a file that nobody vouches for, safe to show on a terminal: other bytes than printable
// ASCII become '?'.
std::string Printable(std::string text);

std::string ReadFile(const std::string& path);
void WriteFile(const std::string& path, const std::string& text);
// The file then holds the text, or, where that fails or this process is ended, what it held before.
void ReplaceFile(const std::string& path, const std::string& text);
// Throws where ReplaceFile would: known before the work whose outcome it is to hold.
void RequirePlace(const std::string& path);

}  // namespace sparkv

#endif

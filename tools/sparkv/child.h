// A program that this command starts: no shell, arguments as they are, the environment spelled out.
#ifndef SPARKV_TOOLS_CHILD_H_
#define SPARKV_TOOLS_CHILD_H_

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace sparkv {

struct Command {
  std::string program;                   // path
  std::vector<std::string> args;         // without the program
  std::vector<std::string> environment;  // "NAME=value", complete
};

// Bytes of a process: now, and the most so far; 0 where the system does not tell.
struct Memory {
  uint64_t resident = 0, peak = 0;
};

using LineHandler = std::function<void(const std::string& line)>;

// A running child. Interrupts sent to this process reach it; it is ended and reaped by the
// destructor.
class Child {
 public:
  enum class Output {
    kInherit,  // stdin, stdout and stderr are this process's own
    kCapture,  // stdout and stderr come through pipes, stdin is empty
    kSilent    // nothing goes in or comes out
  };

  Child(const Command& command, Output output);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // Reads what the child writes until it closes both streams. The last lines of stderr stay in
  // log().
  void Drain(const LineHandler& on_stdout, const LineHandler& on_stderr);
  // The exit code; 128 + signal when a signal ended it.
  int Wait();
  bool Running();
  void Terminate();
  Memory MemoryUse() const;

  const std::deque<std::string>& log() const { return log_; }

 private:
  struct Pipe {
    int fd = -1;
    std::string partial;
  };
  bool ReadLines(Pipe* pipe, const LineHandler& handler, bool keep);
  void CloseAll();

  std::string name_;
  pid_t pid_ = -1;
  int status_ = 0;
  Pipe out_, err_;
  std::deque<std::string> log_;
};

std::string Describe(const std::string& program, int code);
void ThrowIfInterrupted();

// Runs to the end and throws, with the last lines of its log, unless it exits with 0.
void RunToEnd(const Command& command, const LineHandler& on_stdout, const LineHandler& on_stderr);

// A directory that disappears with its content.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace sparkv

#endif

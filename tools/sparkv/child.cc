#include "child.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>

#include "report.h"

namespace sparkv {
namespace {

std::atomic<pid_t> running_child{-1};
volatile sig_atomic_t interrupted = 0;

// A terminal sends Ctrl-C to the child as well; only a signal sent by a process has to be passed
// on.
void OnSignal(int number, siginfo_t* info, void*) {
  interrupted = 1;
  const pid_t child = running_child;
  if (child > 0 && info->si_code <= 0) kill(child, number);
}

void InstallHandlers() {
  static const bool once = [] {
    struct sigaction action = {}, before = {};
    action.sa_sigaction = OnSignal;
    action.sa_flags = SA_SIGINFO;
    for (int number : {SIGINT, SIGTERM, SIGHUP}) {
      sigaction(number, nullptr, &before);
      // nohup, and a shell that starts a job in the background, want some to be ignored.
      if (before.sa_handler != SIG_IGN) sigaction(number, &action, nullptr);
    }
    signal(SIGPIPE, SIG_IGN);
    return true;
  }();
  (void)once;
}

std::vector<char*> Pointers(const std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (const auto& string : strings) pointers.push_back(const_cast<char*>(string.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

void MakePipe(int ends[2]) {
  if (pipe2(ends, O_CLOEXEC) != 0) throw Error(kRuntime, fmt::format("pipe: {}", strerror(errno)));
}

// In the child, before the program: system calls alone. posix_spawn cannot ask for the signal that
// ends a server whose parent was killed.
bool Prepare(pid_t parent, int in, int out, int err) {
  return prctl(PR_SET_PDEATHSIG, SIGTERM) == 0 && getppid() == parent &&
         signal(SIGPIPE, SIG_DFL) != SIG_ERR && (in < 0 || dup2(in, STDIN_FILENO) >= 0) &&
         (out < 0 || dup2(out, STDOUT_FILENO) >= 0) && (err < 0 || dup2(err, STDERR_FILENO) >= 0);
}

}  // namespace

Child::Child(const Command& command, Output output)
    : name_(std::filesystem::path(command.program).filename()) {
  InstallHandlers();
  int out[2] = {-1, -1}, err[2] = {-1, -1}, failure[2];
  MakePipe(failure);
  if (output == Output::kCapture) {
    MakePipe(out);
    MakePipe(err);
  }
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  const bool silent = output == Output::kSilent;
  std::vector<std::string> words = {command.program};
  words.insert(words.end(), command.args.begin(), command.args.end());
  const std::vector<char*> args = Pointers(words), environment = Pointers(command.environment);
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ == 0) {
    if (Prepare(parent, output == Output::kInherit ? -1 : null, silent ? null : out[1],
                silent ? null : err[1])) {
      execve(words[0].c_str(), args.data(), environment.data());
    }
    const int why = errno;
    (void)!write(failure[1], &why, sizeof(why));
    _exit(127);
  }
  int failed = pid_ < 0 ? errno : 0;
  for (int fd : {out[1], err[1], null, failure[1]}) {
    if (fd >= 0) close(fd);
  }
  out_.fd = out[0];
  err_.fd = err[0];
  while (read(failure[0], &failed, sizeof(failed)) < 0 && errno == EINTR) {
  }
  close(failure[0]);
  if (failed) {
    while (pid_ > 0 && waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    CloseAll();
    throw Error(kRuntime,
                fmt::format("{}: cannot be started: {}", command.program, strerror(failed)));
  }
  running_child = pid_;
  if (interrupted) kill(pid_, SIGTERM);  // the signal came while there was no child to pass it to
}

Child::~Child() {
  if (Running()) {
    Terminate();
    while (waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {
    }
    running_child = -1;
  }
  CloseAll();
}

void Child::CloseAll() {
  for (Pipe* pipe : {&out_, &err_}) {
    if (pipe->fd >= 0) close(pipe->fd);
    pipe->fd = -1;
  }
}

bool Child::ReadLines(Pipe* pipe, const LineHandler& handler, bool keep) {
  char buffer[16384];
  const ssize_t n = read(pipe->fd, buffer, sizeof(buffer));
  if (n < 0 && errno == EINTR) return true;
  if (n > 0) pipe->partial.append(buffer, n);
  size_t start = 0;
  const auto take = [&](size_t end) {
    const std::string line = pipe->partial.substr(start, end - start);
    if (handler) handler(line);
    if (keep && !line.empty()) log_.push_back(line);
    if (log_.size() > 40) log_.pop_front();
  };
  for (size_t end; (end = pipe->partial.find('\n', start)) != std::string::npos; start = end + 1)
    take(end);
  pipe->partial.erase(0, start);
  if (n > 0) return true;
  start = 0;
  if (!pipe->partial.empty()) take(pipe->partial.size());
  close(pipe->fd);
  pipe->fd = -1;
  return false;
}

void Child::Drain(const LineHandler& on_stdout, const LineHandler& on_stderr) {
  while (out_.fd >= 0 || err_.fd >= 0) {
    pollfd fds[2] = {{out_.fd, POLLIN, 0}, {err_.fd, POLLIN, 0}};
    if (poll(fds, 2, -1) < 0) continue;
    if (fds[0].revents) ReadLines(&out_, on_stdout, false);
    if (fds[1].revents) ReadLines(&err_, on_stderr, true);
  }
}

bool Child::Running() {
  if (pid_ <= 0) return false;
  const pid_t done = waitpid(pid_, &status_, WNOHANG);
  if (done == 0 || (done < 0 && errno == EINTR)) return true;
  running_child = -1;
  pid_ = -1;
  return false;
}

int Child::Wait() {
  while (pid_ > 0 && waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
  running_child = -1;
  if (WIFSIGNALED(status_)) return 128 + WTERMSIG(status_);
  return WEXITSTATUS(status_);
}

void Child::Terminate() {
  if (pid_ > 0) kill(pid_, SIGTERM);
}

Memory Child::MemoryUse() const {
  Memory memory;
  std::ifstream status(fmt::format("/proc/{}/status", pid_));
  for (std::string name, value; status >> name && std::getline(status, value);) {
    if (name == "VmRSS:") memory.resident = strtoull(value.c_str(), nullptr, 10) * 1024;
    if (name == "VmHWM:") memory.peak = strtoull(value.c_str(), nullptr, 10) * 1024;
  }
  return memory;
}

void ThrowIfInterrupted() {
  if (interrupted) throw Error(kRuntime, "interrupted");
}

void RunToEnd(const Command& command, const LineHandler& on_stdout, const LineHandler& on_stderr) {
  Child child(command, Child::Output::kCapture);
  child.Drain(on_stdout, on_stderr);
  const int code = child.Wait();
  ThrowIfInterrupted();
  if (code == 0) return;
  for (const auto& line : child.log()) fmt::print(stderr, "{}\n", line);
  throw Error(kRuntime, Describe(command.program, code));
}

std::string Describe(const std::string& program, int code) {
  if (code > 128)
    return fmt::format("{}: ended by signal {} ({})", program, code - 128, strsignal(code - 128));
  return fmt::format("{}: ended with exit code {}", program, code);
}

TemporaryFolder::TemporaryFolder() {
  const char* base = getenv("TMPDIR");
  path_ = fmt::format("{}/sparkv-XXXXXX", base && *base ? base : "/tmp");
  if (!mkdtemp(path_.data())) throw Error(kRuntime, fmt::format("{}: {}", path_, strerror(errno)));
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace sparkv

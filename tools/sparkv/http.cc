#include "http.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

constexpr size_t kMaxAnswer = size_t{256} << 20;

class Socket {
 public:
  Socket() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (fd_ < 0) throw Error(kRuntime, fmt::format("socket: {}", strerror(errno)));
  }
  ~Socket() { close(fd_); }
  Socket(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

sockaddr_in Local(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int FreePort() {
  const Socket probe;
  sockaddr_in address = Local(0);
  socklen_t size = sizeof(address);
  if (bind(probe.fd(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      getsockname(probe.fd(), reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw Error(kRuntime, fmt::format("127.0.0.1: no free port: {}", strerror(errno)));
  }
  return ntohs(address.sin_port);
}

Command ServerCommand(const Cache& cache, const std::vector<std::string>& args, int port,
                      const std::string& log, const std::vector<std::string>& environment) {
  Command command = MakeCommand("llama-server", cache, args);
  command.args.insert(command.args.end(), {"--host", "127.0.0.1", "--port", fmt::format("{}", port),
                                           "--no-webui", "--log-file", log});
  command.environment.insert(command.environment.end(), environment.begin(), environment.end());
  return command;
}

}  // namespace

Server::Server(const Cache& cache, const std::vector<std::string>& args, const std::string& log,
               const std::vector<std::string>& environment)
    : port_(FreePort()),
      log_(log),
      child_(ServerCommand(cache, args, port_, log, environment), Child::Output::kSilent) {
  using namespace std::chrono_literals;
  while (Request("GET /health", "").first != 200) {
    ThrowIfInterrupted();
    if (!child_.Running()) {
      ShowLog();
      throw Error(kRuntime,
                  fmt::format("llama-server: ended before it was ready ({})", cache.name));
    }
    std::this_thread::sleep_for(50ms);
  }
}

void Server::ShowLog() const {
  const std::string text = std::filesystem::exists(log_) ? ReadFile(log_) : "";
  fmt::print(stderr, "{}", text.substr(text.size() - std::min<size_t>(text.size(), 4000)));
}

std::pair<int, std::string> Server::Request(const std::string& head, const std::string& body) {
  const Socket connection;
  const sockaddr_in address = Local(port_);
  if (connect(connection.fd(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0)
    return {0, ""};
  const std::string request = fmt::format(
      "{} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
      "{}\r\nConnection: close\r\n\r\n{}",
      head, body.size(), body);
  for (size_t sent = 0; sent < request.size();) {
    const ssize_t n =
        send(connection.fd(), request.data() + sent, request.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return {0, ""};
    sent += n;
  }
  std::string answer;
  char buffer[65536];
  for (;;) {
    const ssize_t n = recv(connection.fd(), buffer, sizeof(buffer), 0);
    ThrowIfInterrupted();
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0 || answer.size() > kMaxAnswer) break;
    answer.append(buffer, n);
  }
  int status = 0;
  if (sscanf(answer.c_str(), "HTTP/%*s %d", &status) != 1) return {0, ""};
  const size_t end = answer.find("\r\n\r\n");
  return {status, end == std::string::npos ? "" : answer.substr(end + 4)};
}

nlohmann::json Server::Post(const std::string& path, const nlohmann::json& body) {
  const auto [status, text] = Request("POST " + path, body.dump());
  auto json = nlohmann::json::parse(text, nullptr, false);
  if (status == 0) {
    using namespace std::chrono_literals;
    // Its sockets close a moment before it has ended.
    for (int i = 0; i < 20 && child_.Running(); ++i) std::this_thread::sleep_for(50ms);
    if (!child_.Running()) {
      ShowLog();
      throw Error(kRuntime, Describe("llama-server", child_.Wait()) + " before it had answered");
    }
  }
  if (status != 200 || json.is_discarded()) {
    throw Error(kRuntime, fmt::format("llama-server: POST {} answered {}: {}", path, status,
                                      text.substr(0, 300)));
  }
  return json;
}

}  // namespace sparkv

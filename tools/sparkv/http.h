// Just enough HTTP to talk JSON with a llama-server that this command started.
#ifndef SPARKV_TOOLS_HTTP_H_
#define SPARKV_TOOLS_HTTP_H_

#include <nlohmann/json.hpp>
#include <string>

#include "child.h"
#include "kv_options.h"

namespace sparkv {

// A llama-server on a free port of 127.0.0.1, ended by the destructor.
class Server {
 public:
  // Returns when the model is loaded; throws with the server's last lines when it ends before.
  // `log` is a file.
  Server(const Cache& cache, const std::vector<std::string>& args, const std::string& log,
         const std::vector<std::string>& environment);
  nlohmann::json Post(const std::string& path, const nlohmann::json& body);
  Memory MemoryUse() const { return child_.MemoryUse(); }

 private:
  // Status and body; status 0 when nobody answers.
  std::pair<int, std::string> Request(const std::string& head, const std::string& body);
  // The last lines of the server's log, to stderr.
  void ShowLog() const;

  int port_;
  std::string log_;
  Child child_;
};

}  // namespace sparkv

#endif

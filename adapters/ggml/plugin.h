// The one device of this plugin and what every part of it needs. Filled once by ggml_backend_score
// or ggml_backend_init, never changed and never destroyed afterwards: hosts free buffers as late as
// in exit handlers.
#pragma once

#include <string>

#include "host.h"
#include "options.h"

namespace sparkv {

struct Plugin {
  Host host;
  Options options;
  std::string isa;
  std::string description;
  ggml_backend_reg reg;
  ggml_backend_device device;
  ggml_backend_buffer_type buffer_type;
};

Plugin& ThePlugin();

// Context of a ggml_backend of ours.
struct Backend {
  int n_threads = 1;
};

}  // namespace sparkv

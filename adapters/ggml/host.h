// The ggml that loaded this plugin. The plugin links no ggml library: it finds the few functions
// that it needs in the process at load time, so that one file serves shared, private and statically
// exporting hosts.
#pragma once

#include <string>

#include "ggml-backend-impl.h"
#include "sparkv/sparkv.h"

namespace sparkv {

struct Host {
  const char* (*version)();
  const char* (*op_name)(ggml_op);
  const char* (*type_name)(ggml_type);
  size_t (*tensor_overhead)();
  int (*graph_n_nodes)(ggml_cgraph*);
  ggml_tensor* (*graph_node)(ggml_cgraph*, int);
  ggml_backend_buffer_t (*buffer_init)(ggml_backend_buffer_type_t, ggml_backend_buffer_i,
                                       void* context, size_t size);

  // Numbers of this host, looked up by name: they move between releases.
  ggml_op none, reshape, view, permute, transpose, set_rows, flash_attn_ext, rope;
  ggml_type f16, f32, i32, i64;
};

// Binds every function and number of `host`. `caller` is an address inside the library that called
// us: it is asked first, because a process may hold several copies of ggml. Returns "" or why this
// host cannot be served.
std::string BindHost(const void* caller, Host* host);

// The OpenMP runtime that ggml's CPU backend computes with; NULL: it has threads of another kind,
// or is not there yet.
sparkv_team HostTeam();

// True in the programs that execute graphs from the network.
bool IsRpcServer();

}  // namespace sparkv

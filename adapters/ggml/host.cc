#include "host.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace sparkv {
namespace {

constexpr char kBuiltFor[] = SPARKV_GGML_VERSION;
constexpr size_t kObjectSize = 32;  // ggml_object, private to ggml, part of ggml_tensor_overhead()

int CollectName(dl_phdr_info* info, size_t, void* names) {
  static_cast<std::vector<std::string>*>(names)->push_back(info->dlpi_name);
  return 0;
}

// A handle whose symbols include ggml, or NULL. The handles stay open: they only count references
// of what is loaded.
void* FindGgml(const void* caller) {
  const auto has_ggml = [](void* handle) {
    return handle && dlsym(handle, "ggml_backend_buffer_init");
  };
  Dl_info info;
  if (dladdr(caller, &info) && info.dli_fname) {
    void* handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (has_ggml(handle)) return handle;
  }
  void* program = dlopen(nullptr, RTLD_LAZY);
  if (has_ggml(program)) return program;
  std::vector<std::string> names;
  dl_iterate_phdr(CollectName, &names);
  for (const std::string& name : names) {
    if (name.empty()) continue;
    void* handle = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (has_ggml(handle)) return handle;
    if (handle) dlclose(handle);
  }
  return program;  // a very old or partial ggml may still tell its version
}

template <typename F>
bool Bind(void* handle, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(handle, name));
  return *function != nullptr;
}

bool FindOp(const Host& host, const char* name, ggml_op* op) {
  for (int i = 0; i < GGML_OP_COUNT; ++i) {
    const char* host_name = host.op_name(static_cast<ggml_op>(i));
    if (host_name && std::strcmp(host_name, name) == 0) {
      *op = static_cast<ggml_op>(i);
      return true;
    }
  }
  return false;
}

bool FindType(const Host& host, const char* name, ggml_type* type) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* host_name = host.type_name(static_cast<ggml_type>(i));
    if (host_name && std::strcmp(host_name, name) == 0) {
      *type = static_cast<ggml_type>(i);
      return true;
    }
  }
  return false;
}

}  // namespace

std::string BindHost(const void* caller, Host* host) {
  void* ggml = FindGgml(caller);
  const std::string wanted = std::string("this plugin is built for ggml ") + kBuiltFor;
  if (!ggml || !Bind(ggml, "ggml_version", &host->version)) {
    const bool old = ggml && dlsym(ggml, "ggml_backend_buffer_init");
    return (old ? "this program holds a ggml without ggml_version(), "
                : "this program shows no ggml, ") +
           wanted;
  }
  // The version comes first: nothing else of an unknown generation may be called. Structures have
  // changed within one GGML_BACKEND_API_VERSION, so only the release whose headers we saw is safe.
  const char* version = host->version();
  if (!version || std::strcmp(version, kBuiltFor) != 0) {
    return std::string("this program has ggml ") + (version ? version : "of no version") + ", " +
           wanted;
  }
  const bool bound = Bind(ggml, "ggml_op_name", &host->op_name) &&
                     Bind(ggml, "ggml_type_name", &host->type_name) &&
                     Bind(ggml, "ggml_tensor_overhead", &host->tensor_overhead) &&
                     Bind(ggml, "ggml_graph_n_nodes", &host->graph_n_nodes) &&
                     Bind(ggml, "ggml_graph_node", &host->graph_node) &&
                     Bind(ggml, "ggml_backend_buffer_init", &host->buffer_init);
  if (!bound)
    return std::string("ggml ") + version + " of this program hides functions that a backend needs";
  if (host->tensor_overhead() != kObjectSize + sizeof(ggml_tensor)) {
    return std::string("ggml ") + version +
           " of this program has another ggml_tensor than the one we were built for";
  }
  const bool named =
      FindOp(*host, "NONE", &host->none) && FindOp(*host, "RESHAPE", &host->reshape) &&
      FindOp(*host, "VIEW", &host->view) && FindOp(*host, "PERMUTE", &host->permute) &&
      FindOp(*host, "TRANSPOSE", &host->transpose) && FindOp(*host, "SET_ROWS", &host->set_rows) &&
      FindOp(*host, "FLASH_ATTN_EXT", &host->flash_attn_ext) &&
      FindOp(*host, "ROPE", &host->rope) && FindType(*host, "f16", &host->f16) &&
      FindType(*host, "f32", &host->f32) && FindType(*host, "i32", &host->i32) &&
      FindType(*host, "i64", &host->i64);
  return named ? ""
               : std::string("ggml ") + version +
                     " of this program lacks an op or a type that we need";
}

sparkv_team HostTeam() {
  std::vector<std::string> names;
  dl_iterate_phdr(CollectName, &names);
  for (const std::string& name : names) {  // "" is the program
    void* handle = dlopen(name.empty() ? nullptr : name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    Dl_info info;
    const void* cpu = handle ? dlsym(handle, "ggml_backend_cpu_init") : nullptr;
    if (!cpu || !dladdr(cpu, &info) || !info.dli_fname) {
      if (handle) dlclose(handle);
      continue;
    }
    // Of the library that holds the backend, and of what that was linked with: not of any library
    // that happens to be in the process.
    void* backend = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    sparkv_team team = nullptr;
    Bind(backend ? backend : handle, "GOMP_parallel", &team);
    return team;
  }
  return nullptr;
}

bool IsRpcServer() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (length <= 0) return false;
  path[length] = '\0';
  const char* slash = std::strrchr(path, '/');
  return std::strstr(slash ? slash : path, "rpc-server") != nullptr;
}

}  // namespace sparkv

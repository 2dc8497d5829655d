// A program that loads the plugin as ggml does, but is another host than the one the plugin is
// built for:
//   fake_host PLUGIN TEXT...
// passes when the plugin refuses to load with exactly one line on stderr that holds every TEXT.
// The macros choose which ggml this program pretends to be; the functions that a plugin must not
// call in a host of another generation end the test.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

extern "C" {
#define EXPORT __attribute__((visibility("default")))
#ifdef FAKE_VERSION
EXPORT const char* ggml_version() { return FAKE_VERSION; }
#endif
#ifdef FAKE_OVERHEAD  // the right version, structures of another size
EXPORT const char* ggml_op_name(int) { return "NONE"; }
EXPORT const char* ggml_type_name(int) { return "f16"; }
EXPORT size_t ggml_tensor_overhead() { return FAKE_OVERHEAD; }
EXPORT int ggml_graph_n_nodes(void*) { std::_Exit(70); }
EXPORT void* ggml_graph_node(void*, int) { std::_Exit(71); }
#elif defined(FAKE_VERSION)
EXPORT const char* ggml_op_name(int) { std::_Exit(72); }
EXPORT const char* ggml_type_name(int) { std::_Exit(73); }
EXPORT size_t ggml_tensor_overhead() { std::_Exit(74); }
#endif
#ifdef FAKE_GGML
EXPORT void* ggml_backend_buffer_init(void*, void*, void*, size_t) { std::_Exit(75); }
#endif
}

namespace {

int Fail(const std::string& why) {
  std::printf("%s\n", why.c_str());
  return 1;
}

// What `call` writes to stderr.
template <typename F>
std::string Stderr(F call) {
  std::FILE* file = std::tmpfile();
  const int saved = dup(2);
  dup2(fileno(file), 2);
  call();
  std::fflush(stderr);
  dup2(saved, 2);
  std::string text;
  std::rewind(file);
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
  std::fclose(file);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return Fail("usage: fake_host PLUGIN TEXT...");
  void* plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!plugin) return Fail(std::string("dlopen: ") + dlerror());
  const auto score = reinterpret_cast<int (*)()>(dlsym(plugin, "ggml_backend_score"));
  const auto init = reinterpret_cast<void* (*)()>(dlsym(plugin, "ggml_backend_init"));
  if (!score || !init)
    return Fail("the plugin exports no ggml_backend_score or no ggml_backend_init");

  const std::string said = Stderr([&] {
    if (score() != 0) std::_Exit(76);
    if (init() != nullptr) std::_Exit(77);
    dlclose(plugin);
  });
  if (std::count(said.begin(), said.end(), '\n') != 1)
    return Fail("not one line on stderr: " + said);
  for (int i = 2; i < argc; ++i) {
    if (said.find(argv[i]) == std::string::npos)
      return Fail("no '" + std::string(argv[i]) + "' in: " + said);
  }
  return 0;
}

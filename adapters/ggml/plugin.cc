#include "plugin.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "buffer.h"
#include "graph.h"

namespace sparkv {
namespace {

constexpr char kName[] = "SPARKV";
constexpr int kBitsHeadDim = 128;  // the head size that the shrink of a preset is quoted for

uint8_t backend_guid[16] = {0x73, 0x70, 0x61, 0x72, 0x6b, 0x76, 0x2d, 0x67,
                            0x67, 0x6d, 0x6c, 0x2d, 0x62, 0x65, 0x31, 0x00};

// ---- backend

const char* BackendName(ggml_backend_t) { return kName; }

void FreeBackend(ggml_backend_t backend) {
  static std::atomic_flag said = ATOMIC_FLAG_INIT;
  if (!SawCache() && WasPlanned() && !said.test_and_set()) {
    Log(LogLevel::kWarn,
        "no KV cache was put on device %s (-nkvo, -ngl 0 or a model without one): nothing was "
        "packed",
        kName);
  }
  delete static_cast<Backend*>(backend->context);
  delete backend;
}

// ---- device

ggml_backend_t InitBackend(ggml_backend_dev_t device, const char*) {
  ggml_backend_i calls = {};
  calls.get_name = BackendName;
  calls.free = FreeBackend;
  calls.graph_compute = Compute;
  return new (std::nothrow) ggml_backend{&backend_guid, calls, device, new (std::nothrow) Backend};
}

void SetThreads(ggml_backend_t backend, int n_threads) {
  static_cast<Backend*>(backend->context)->n_threads = n_threads;
}

const char* DeviceName(ggml_backend_dev_t) { return kName; }
const char* DeviceDescription(ggml_backend_dev_t) { return ThePlugin().description.c_str(); }

// An integrated GPU: llama.cpp gives it layers by --device or when there is no real GPU, and sends
// to it only the ops that it claims.
enum ggml_backend_dev_type DeviceType(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_IGPU; }

size_t MemInfo(const char* field) {
  size_t kib = 0;
  if (FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[256];
    const size_t length = std::strlen(field);
    while (std::fgets(line, sizeof(line), file)) {
      if (std::strncmp(line, field, length) == 0 && line[length] == ':') {
        std::sscanf(line + length + 1, "%zu", &kib);
        break;
      }
    }
    std::fclose(file);
  }
  return kib * 1024;
}

// System memory, in the currency of the host: it counts the cache as f16 when it fits a context
// into what is free
// (-fit), so a preset that packs to a third has room for three times as much.
void DeviceMemory(ggml_backend_dev_t, size_t* free, size_t* total) {
  const sparkv_config& config = ThePlugin().options.config;
  const size_t packed =
      sparkv_key_row_bytes(&config, kBitsHeadDim) + sparkv_value_row_bytes(&config, kBitsHeadDim);
  const double shrink =
      packed > 0 ? std::max(1.0, 4.0 * kBitsHeadDim / static_cast<double>(packed)) : 1.0;
  *free = static_cast<size_t>(static_cast<double>(MemInfo("MemAvailable")) * shrink);
  *total = static_cast<size_t>(static_cast<double>(MemInfo("MemTotal")) * shrink);
}

// Weights stay with the CPU backend, so nothing of ours keeps the host from mapping the model's
// file instead of reading it into memory of its own. Older hosts do not ask.
template <typename Caps>
void AllowMappedWeights(Caps* caps) {
  if constexpr (requires { caps->mmap_support; }) caps->mmap_support = true;
}

void DeviceProperties(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = DeviceName(device);
  props->description = DeviceDescription(device);
  props->type = DeviceType(device);
  DeviceMemory(device, &props->memory_free, &props->memory_total);
  AllowMappedWeights(&props->caps);
}

ggml_backend_buffer_type_t DeviceBufferType(ggml_backend_dev_t) { return &ThePlugin().buffer_type; }

bool DeviceSupportsOp(ggml_backend_dev_t, const ggml_tensor* op) { return SupportsOp(op); }

// Host memory too: queries, rows and masks are read where the CPU backend made them.
bool DeviceSupportsBuffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return type == &ThePlugin().buffer_type || (type->iface.is_host && type->iface.is_host(type));
}

// ---- registration

const char* RegName(ggml_backend_reg_t) { return kName; }
size_t DeviceCount(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t GetDevice(ggml_backend_reg_t, size_t index) {
  return index == 0 ? &ThePlugin().device : nullptr;
}

void* GetProcAddress(ggml_backend_reg_t, const char* name) {
  return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void*>(SetThreads)
                                                              : nullptr;
}

void FillInterfaces(Plugin* plugin) {
  plugin->reg.api_version = GGML_BACKEND_API_VERSION;
  plugin->reg.iface = {RegName, DeviceCount, GetDevice, GetProcAddress};
  plugin->buffer_type = {BufferTypeInterface(), &plugin->device, nullptr};
  ggml_backend_device_i calls = {};
  calls.get_name = DeviceName;
  calls.get_description = DeviceDescription;
  calls.get_memory = DeviceMemory;
  calls.get_type = DeviceType;
  calls.get_props = DeviceProperties;
  calls.init_backend = InitBackend;
  calls.get_buffer_type = DeviceBufferType;
  calls.supports_op = DeviceSupportsOp;
  calls.supports_buft = DeviceSupportsBuffer;
  plugin->device = {calls, &plugin->reg, nullptr};
}

// The instruction set that caches will use; also proves that the configuration makes a cache on
// this machine.
std::string FindIsa(const Options& options, std::string* isa) {
  const sparkv_layer_shape layer = {1, kBitsHeadDim, kBitsHeadDim};
  sparkv_shape shape = {};
  shape.struct_size = sizeof(shape);
  shape.n_layers = 1;
  shape.n_model_layers = 10000;  // of any model: layers may have settings of their own
  shape.layers = &layer;
  shape.cells_per_stream = 1;
  shape.n_streams = 1;
  sparkv_config config = options.config;
  if (config.baseline[0] == '\0') config.budget[0] = '\0';  // of a real cache; codecs have none
  sparkv_cache* cache = nullptr;
  sparkv_error error = {};
  if (sparkv_cache_create(&config, &shape, &cache, &error) != SPARKV_OK) {
    const char* simd = std::getenv("SPARKV_SIMD");
    const bool at_fault = std::strncmp(error.text, "simd", 4) == 0;
    return at_fault && simd ? std::string("SPARKV_SIMD=") + simd + ": " + error.text : error.text;
  }
  *isa = sparkv_cache_isa(cache);
  sparkv_cache_free(cache);
  return "";
}

// Under eviction window, stages and layers are not what the preset's name makes expect.
void LogAges(const sparkv_config& config) {
  sparkv_config usual = {};
  usual.struct_size = sizeof(usual);
  if (config.evict == SPARKV_EVICT_NONE ||
      sparkv_config_preset(&usual, config.preset, nullptr) != SPARKV_OK)
    return;
  std::string stages;
  sparkv_config rows = {};
  rows.struct_size = sizeof(rows);
  int32_t until = 0, n = 0;
  for (; sparkv_config_recent(&config, n, &until, &rows, nullptr) == SPARKV_OK; ++n)
    stages += (n == 0 ? ", stages until " : ", ") + std::to_string(until);
  if (config.window == usual.window && std::strcmp(config.recent, usual.recent) == 0 &&
      std::strcmp(config.layers, usual.layers) == 0 &&
      n == std::count(config.recent, std::end(config.recent), ':'))
    return;
  Log(LogLevel::kInfo,
      "heads that keep %d tokens: window %d%s; without eviction %s has window %d, stages %s, "
      "layers %s",
      config.evict_tokens, config.window, stages.empty() ? ", no stages" : stages.c_str(),
      usual.preset, usual.window, usual.recent[0] != '\0' ? usual.recent : "none",
      usual.layers[0] != '\0' ? usual.layers : "alike");
}

std::string Load(const void* caller, Plugin* plugin) {
  if (std::string reason = ReadOptions(&plugin->options); !reason.empty()) return reason;
  SetLogLevel(plugin->options.log);
  if (IsRpcServer() && !plugin->options.allow_rpc) {
    return "not in an RPC server, whose graphs come from the network; SPARKV_ALLOW_RPC=1 allows it";
  }
  if (std::string reason = BindHost(caller, &plugin->host); !reason.empty()) return reason;
  if (std::string reason = FindIsa(plugin->options, &plugin->isa); !reason.empty()) return reason;
  FillInterfaces(plugin);
  const sparkv_config& config = plugin->options.config;
  std::string text(sparkv_config_text(&config, nullptr, 0) + 1, '\0');
  sparkv_config_text(&config, text.data(), text.size());
  plugin->description = std::string("SparK KV cache ") + config.preset + ", " + plugin->isa;
  Log(LogLevel::kInfo, "%s, %s, version %s", text.c_str(), plugin->isa.c_str(), sparkv_version());
  LogAges(config);
  if (config.baseline[0] != '\0') {
    Log(LogLevel::kWarn,
        "baseline %s is a simulation for comparison: bits are what that codec would store, memory "
        "is what preset exact takes",
        config.baseline);
  }
  std::atexit(ReportAllAtExit);
  return "";
}

// Loads once; false when this process cannot use the plugin, which has then been said.
bool Loaded(const void* caller) {
  static const bool loaded = [caller] {
    const std::string reason = Load(caller, &ThePlugin());
    if (!reason.empty()) Log(LogLevel::kError, "%s", reason.c_str());
    return reason.empty();
  }();
  return loaded;
}

}  // namespace

Plugin& ThePlugin() {
  static Plugin* plugin = new Plugin();
  return *plugin;
}

}  // namespace sparkv

extern "C" {

__attribute__((visibility("default"))) int ggml_backend_score() {
  return sparkv::Loaded(__builtin_return_address(0)) ? 1 : 0;
}

__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  return sparkv::Loaded(__builtin_return_address(0)) ? &sparkv::ThePlugin().reg : nullptr;
}

}  // extern "C"

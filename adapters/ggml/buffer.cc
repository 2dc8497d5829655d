#include "buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <new>

#include "plugin.h"

namespace sparkv {
namespace {

constexpr size_t kAlignment = 64;

std::atomic<bool> saw_cache{false};

// Every buffer of the process and the reports of caches that have ended.
struct Registry {
  std::mutex mutex;
  std::vector<Buffer*> live;
  std::vector<bool> weights_slots;
  std::vector<std::string>
      weights;  // of caches that have ended, as sparkv_cache_save_weights gives them; oldest first
  std::map<int, CacheReport> finished;  // by cache id
  int next_id = 0;
  int32_t n_model_layers = 0;  // highest layer number seen, and one
  bool calibrated = false;     // some cache has taken SPARKV_CALIBRATION
  bool has_picture = false;    // some cache is the one of SPARKV_SALIENCY
};

Registry& TheRegistry() {
  static Registry* registry = new Registry;  // outlives exit handlers
  return *registry;
}

int32_t ModelLayers() {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  return registry.n_model_layers;
}

// A host may take the state of one context and give it to the next (llama-bench does): the weights
// of its rows outlive the cache that made them.
constexpr size_t kKeptWeights = size_t{16} << 20;

// What one of the library's functions that save gives.
std::string Saved(const sparkv_cache* cache, decltype(&sparkv_cache_save_weights) save) {
  std::string bytes(save(cache, nullptr, 0), '\0');
  save(cache, bytes.data(), bytes.size());
  return bytes;
}

std::string WeightsOf(const sparkv_cache* cache) { return Saved(cache, sparkv_cache_save_weights); }

void KeepWeights(const sparkv_cache* cache, std::vector<std::string>* kept) {
  std::string bytes = WeightsOf(cache);
  if (bytes.size() > kKeptWeights) return;
  kept->push_back(std::move(bytes));
  size_t total = 0;
  for (const std::string& each : *kept) total += each.size();
  while (total > kKeptWeights) {
    total -= kept->front().size();
    kept->erase(kept->begin());
  }
}

// What fits the cache moves into it, from where it is kept again when the cache ends.
void TakeWeights(sparkv_cache* cache, std::vector<std::string>* kept) {
  sparkv_error error = {};
  std::erase_if(*kept, [&](const std::string& bytes) {
    return sparkv_cache_load_weights(cache, bytes.data(), bytes.size(), &error) == SPARKV_OK;
  });
}

// cache_k_l<il> or cache_v_l<il>, exactly.
bool ParseCacheName(const char* name, int* il, bool* keys) {
  char kind = 0;
  int end = 0;
  if (std::sscanf(name, "cache_%c_l%d%n", &kind, il, &end) != 2 || name[end] != '\0') return false;
  *keys = kind == 'k';
  return kind == 'k' || kind == 'v';
}

bool HasCacheName(const ggml_tensor* tensor) {
  if (std::strncmp(tensor->name, "cache_", 6) != 0) return false;
  saw_cache.store(true, std::memory_order_relaxed);
  return true;
}

const ggml_tensor* Root(const ggml_tensor* tensor) {
  return tensor->view_src ? tensor->view_src : tensor;
}

std::string FileOfSlot(const std::string& path, int slot) {
  return slot == 0 ? path : path + "." + std::to_string(slot);
}

Buffer* BufferOf(ggml_backend_buffer_t buffer) { return static_cast<Buffer*>(buffer->context); }

size_t BytesBegin(const ggml_tensor* tensor, size_t offset) {
  return (tensor->view_src ? tensor->view_offs : 0) + offset;
}

}  // namespace

bool IsCacheTensor(const ggml_tensor* tensor) {
  const ggml_tensor* root = Root(tensor);
  return root->buffer && root->buffer->buft == &ThePlugin().buffer_type &&
         root->buffer->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE && HasCacheName(root);
}

const KvTensor* KvOf(const ggml_tensor* tensor) {
  return IsCacheTensor(tensor) ? static_cast<const KvTensor*>(Root(tensor)->extra) : nullptr;
}

bool SawCache() { return saw_cache; }

// ---- one buffer

Buffer::Buffer(void* base, size_t size) : base_(base), size_(size) {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  registry.live.push_back(this);
}

Buffer::~Buffer() {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  registry.live.erase(std::find(registry.live.begin(), registry.live.end(), this));
  if (cache_) {
    const CacheReport report = Report();
    SaveFiles();
    KeepWeights(cache_, &registry.weights);
    sparkv_cache_free(cache_);
    registry.weights_slots[static_cast<size_t>(weights_slot_)] = false;
    registry.finished[id_] = report;
    if (report.memory.tokens > 0) Log(LogLevel::kInfo, "%s", ReportLine(report).c_str());
    const Plugin& plugin = ThePlugin();
    if (!plugin.options.stats.empty()) {
      std::vector<CacheReport> reports;
      for (const auto& [id, finished] : registry.finished) reports.push_back(finished);
      WriteFile(plugin.options.stats, StatsJson(plugin.options, plugin.isa, reports));
    }
  }
  munmap(base_, size_);
}

bool Buffer::MakeWritable() {
  if (!writable_) writable_ = mprotect(base_, size_, PROT_READ | PROT_WRITE) == 0;
  if (!writable_) Log(LogLevel::kError, "no memory for a buffer of %zu bytes", size_);
  return writable_;
}

ggml_status Buffer::InitTensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  if (tensor->view_src) return GGML_STATUS_SUCCESS;
  if (buffer->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE || !HasCacheName(tensor)) {
    return MakeWritable() ? GGML_STATUS_SUCCESS : GGML_STATUS_ALLOC_FAILED;
  }
  int il = 0;
  bool keys = false;
  if (ParseCacheName(tensor->name, &il, &keys)) return InitCacheTensor(tensor, il, keys);
  const char kind = tensor->name[6];
  Log(LogLevel::kError, "%s: %s cannot be packed; run this model without the SPARKV device",
      tensor->name,
      kind == 'r' || kind == 's' ? "the state of a recurrent layer" : "this kind of cache");
  return GGML_STATUS_FAILED;
}

ggml_status Buffer::InitCacheTensor(ggml_tensor* tensor, int il, bool keys) {
  const Host& host = ThePlugin().host;
  if (tensor->type != host.f16) {
    Log(LogLevel::kError, "%s has type %s: sparkv packs f16 rows itself, leave -ct%c at f16",
        tensor->name, host.type_name(tensor->type), keys ? 'k' : 'v');
    return GGML_STATUS_FAILED;
  }
  const bool first = layers_.empty();
  if (tensor->ne[3] != 1 || (!first && (tensor->ne[1] != cells_ || tensor->ne[2] != n_streams_))) {
    Log(LogLevel::kError, "%s has another number of cells than the rest of its cache",
        tensor->name);
    return GGML_STATUS_FAILED;
  }
  cells_ = tensor->ne[1];
  n_streams_ = tensor->ne[2];
  auto found = std::find_if(layers_.begin(), layers_.end(),
                            [&](const auto& layer) { return layer->il == il; });
  if (found == layers_.end()) {
    layers_.push_back(std::make_unique<Layer>());
    found = layers_.end() - 1;
    (*found)->il = il;
    Registry& registry = TheRegistry();
    const std::lock_guard lock(registry.mutex);
    registry.n_model_layers = std::max(registry.n_model_layers, il + 1);
  }
  KvTensor& kv = keys ? (*found)->keys : (*found)->values;
  if (kv.buffer) {
    Log(LogLevel::kError, "%s appears twice in one cache", tensor->name);
    return GGML_STATUS_FAILED;
  }
  kv = {this, static_cast<size_t>(found - layers_.begin()), keys, tensor->nb[1], tensor->nb[2]};
  tensor->extra = &kv;
  return GGML_STATUS_SUCCESS;
}

std::string Buffer::SetShape(size_t layer, const sparkv_layer_shape& shape) {
  sparkv_layer_shape& known = layers_[layer]->shape;
  const auto text = [](const sparkv_layer_shape& s) {
    return std::to_string(s.n_kv_heads) + " heads of " + std::to_string(s.k_dim) + "/" +
           std::to_string(s.v_dim);
  };
  if (known.n_kv_heads == 0) {
    if (sparkv_key_row_bytes(&ThePlugin().options.config, shape.k_dim) == 0 ||
        sparkv_value_row_bytes(&ThePlugin().options.config, shape.v_dim) == 0) {
      return text(shape) + " channels: head sizes are 32 to 512 in steps of 8";
    }
    known = shape;
    return "";
  }
  const bool same = known.n_kv_heads == shape.n_kv_heads && known.k_dim == shape.k_dim &&
                    known.v_dim == shape.v_dim;
  return same ? "" : text(shape) + " channels after " + text(known);
}

// A layer that no graph has read yet (the host planned its graphs before) takes the shape of a
// layer of its widths.
bool Buffer::FillShapes(std::string* reason) {
  for (const auto& layer : layers_) {
    if (!layer->keys.buffer || !layer->values.buffer) {
      *reason = "layer " + std::to_string(layer->il) + " has no " +
                (layer->keys.buffer ? "values" : "keys") + " of its own (MLA)";
      return false;
    }
    if (layer->shape.n_kv_heads != 0) continue;
    const auto twin = std::find_if(layers_.begin(), layers_.end(), [&](const auto& other) {
      return other->shape.n_kv_heads != 0 && other->keys.row_bytes == layer->keys.row_bytes &&
             other->values.row_bytes == layer->values.row_bytes;
    });
    if (twin == layers_.end()) {
      *reason = "layer " + std::to_string(layer->il) +
                " is written before any graph showed its head size";
      return false;
    }
    layer->shape = (*twin)->shape;
  }
  return true;
}

std::vector<sparkv_layer_shape> Buffer::Shapes() const {
  std::vector<sparkv_layer_shape> shapes;
  for (const auto& layer : layers_) shapes.push_back(layer->shape);
  return shapes;
}

// A model with sliding windows has two caches, each with some of its layers; a draft model beside
// it has one with all of its own.
bool Buffer::SharesModel(const Buffer& other) const {
  return !layers_.empty() && !other.layers_.empty() &&
         std::none_of(layers_.begin(), layers_.end(), [&](const auto& mine) {
           return std::any_of(other.layers_.begin(), other.layers_.end(),
                              [&](const auto& theirs) { return theirs->il == mine->il; });
         });
}

// What sparkv_shape points to.
struct Buffer::Shape {
  std::vector<sparkv_layer_shape> layers;
  std::vector<int32_t> numbers;
  sparkv_shape of_cache = {};

  Shape(const Buffer& buffer, int32_t n_model_layers) : layers(buffer.Shapes()) {
    for (const auto& layer : buffer.layers_) numbers.push_back(layer->il);
    of_cache.struct_size = sizeof(of_cache);
    of_cache.n_layers = static_cast<int32_t>(layers.size());
    of_cache.layers = layers.data();
    of_cache.cells_per_stream = buffer.cells_;
    of_cache.n_streams = static_cast<int32_t>(buffer.n_streams_);
    of_cache.layer_numbers = numbers.data();
    const int32_t last = *std::max_element(numbers.begin(), numbers.end());
    if (last + 1 != of_cache.n_layers) of_cache.n_model_layers = n_model_layers;
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;
};

// A budget is for all caches of a model together: whichever is made first solves it for both.
bool Buffer::SolveBudget(sparkv_config* config, std::string* reason) {
  if (!budgeted_) {
    Registry& registry = TheRegistry();
    const std::lock_guard lock(registry.mutex);
    std::vector<Buffer*> partners = registry.live;
    std::deque<Shape> shapes;
    std::vector<sparkv_shape> caches;
    shapes.emplace_back(*this, registry.n_model_layers);
    caches.push_back(shapes.back().of_cache);
    std::vector<std::unique_lock<std::mutex>> locks;  // a partner is idle: the host runs this one
    std::erase_if(partners, [&](Buffer* other) {
      std::string unused;
      if (other == this) return true;
      std::unique_lock theirs(other->mutex, std::try_to_lock);
      if (!theirs.owns_lock() || other->cache_ || !SharesModel(*other) ||
          !other->FillShapes(&unused)) {
        return true;
      }
      shapes.emplace_back(*other, registry.n_model_layers);
      caches.push_back(shapes.back().of_cache);
      locks.push_back(std::move(theirs));
      return false;
    });
    sparkv_error error = {};
    sparkv_config solved = *config;
    if (sparkv_config_budget(config, caches.data(), static_cast<int32_t>(caches.size()), &solved,
                             &error) != SPARKV_OK) {
      *reason = error.text;
      return false;
    }
    std::string stages;
    if (std::strcmp(solved.recent, config->recent) != 0)
      stages =
          std::string("; stages given up, recent ") + (*solved.recent ? solved.recent : "none");
    Log(LogLevel::kInfo, "budget %s: layers %s%s", config->budget, solved.layers, stages.c_str());
    budgeted_ = solved;
    for (Buffer* partner : partners) partner->budgeted_ = solved;
  }
  *config = *budgeted_;
  return true;
}

sparkv_cache* Buffer::Cache() {
  if (broken_ || refused_) return nullptr;
  if (cache_) return cache_;
  std::string reason;
  if (!FillShapes(&reason)) {
    Break(reason);
    return nullptr;
  }
  sparkv_config config = ThePlugin().options.config;
  if (config.budget[0] != '\0' && !SolveBudget(&config, &reason)) {
    Refuse(reason);
    return nullptr;
  }
  const Shape shape(*this, ModelLayers());
  sparkv_error error = {};
  const sparkv_status made = sparkv_cache_create(&config, &shape.of_cache, &cache_, &error);
  if (made != SPARKV_OK) {
    cache_ = nullptr;
    made == SPARKV_INVALID ? Refuse(error.text) : Break(error.text);  // settings do not heal
    return nullptr;
  }
  if (!Calibrate(&reason)) {
    sparkv_cache_free(cache_);
    cache_ = nullptr;
    Refuse(reason);
    return nullptr;
  }
  {
    Registry& registry = TheRegistry();
    const std::lock_guard lock(registry.mutex);
    id_ = registry.next_id++;
    // The lowest free slot: a process that is started again with the same caches finds the same
    // files.
    std::vector<bool>& slots = registry.weights_slots;
    weights_slot_ = static_cast<int>(std::find(slots.begin(), slots.end(), false) - slots.begin());
    if (static_cast<size_t>(weights_slot_) == slots.size()) slots.push_back(false);
    slots[static_cast<size_t>(weights_slot_)] = true;
    TakeWeights(cache_, &registry.weights);
    // The picture is of the first cache that has the layer.
    const Options& options = ThePlugin().options;
    pictured_ = !options.saliency.empty() && !registry.has_picture &&
                std::any_of(layers_.begin(), layers_.end(),
                            [&](const auto& layer) { return layer->il == options.saliency_layer; });
    registry.has_picture = registry.has_picture || pictured_;
  }
  LoadWeights();
  return cache_;
}

// Takes what is known of the model, or begins to measure it. A file that fits the first cache is of
// the host's model; a later one may be of a draft model.
bool Buffer::Calibrate(std::string* reason) {
  const Options& options = ThePlugin().options;
  sparkv_error error = {};
  if (!options.calibrate.empty()) sparkv_cache_start_calibration(cache_, &error);
  if (options.errors && sparkv_cache_start_errors(cache_, &error) != SPARKV_OK)
    Log(LogLevel::kWarn, "%s", error.text);
  if (options.calibration.empty()) return true;
  const std::lock_guard lock(TheRegistry().mutex);
  bool& calibrated = TheRegistry().calibrated;
  if (sparkv_cache_load_calibration(cache_, options.calibration.data(), options.calibration.size(),
                                    &error) == SPARKV_OK) {
    calibrated = true;
    return true;
  }
  if (calibrated) {
    Log(LogLevel::kWarn, "another cache goes without: %s", error.text);
    return true;
  }
  *reason = error.text;
  return false;
}

void Buffer::LoadWeights() {
  if (ThePlugin().options.weights.empty()) return;
  const std::string path = FileOfSlot(ThePlugin().options.weights, weights_slot_);
  std::string bytes, reason;
  if (!ReadFile(path, &bytes, &reason)) {
    if (!reason.empty()) Log(LogLevel::kError, "cannot read %s: %s", path.c_str(), reason.c_str());
    return;
  }
  sparkv_error error = {};
  if (sparkv_cache_load_weights(cache_, bytes.data(), bytes.size(), &error) != SPARKV_OK) {
    Log(LogLevel::kWarn, "%s is not used and will be replaced: %s", path.c_str(), error.text);
  }
}

void Buffer::SaveWeights() {
  const Options& options = ThePlugin().options;
  if (options.weights.empty() || weights_saved_) return;
  weights_saved_ = true;
  std::string bytes = WeightsOf(cache_);
  const size_t hash = std::hash<std::string>()(bytes);
  if (hash == weights_hash_) return;
  if (WriteFile(FileOfSlot(options.weights, weights_slot_), bytes)) weights_hash_ = hash;
}

void Buffer::SaveFiles() {
  const Options& options = ThePlugin().options;
  SaveWeights();
  if (!options.calibrate.empty()) {
    const std::string bytes = Saved(cache_, sparkv_cache_save_calibration);
    // A cache that saw no token leaves a file of before alone: nobody could read what it would
    // write.
    char model[128];
    if (sparkv_calibration_model(bytes.data(), bytes.size(), model, nullptr) == SPARKV_OK)
      WriteFile(FileOfSlot(options.calibrate, weights_slot_), bytes);
  }
  if (!pictured_) return;
  const auto layer = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const auto& l) { return l->il == options.saliency_layer; });
  if (options.saliency_head >= (*layer)->shape.n_kv_heads) {
    Log(LogLevel::kError, "SPARKV_SALIENCY: layer %d has no KV head %d", options.saliency_layer,
        options.saliency_head);
    return;
  }
  WriteFile(options.saliency, SaliencyJson(cache_, static_cast<int>(layer - layers_.begin()),
                                           options.saliency_head, (*layer)->shape.k_dim));
}

CacheReport Buffer::Report() const {
  CacheReport report = MakeReport(cache_, Shapes(), budgeted_ ? budgeted_->layers : "");
  for (size_t i = 0; i < layers_.size() && ThePlugin().options.errors; ++i) {
    const LayerErrors errors =
        ErrorsOf(cache_, static_cast<int>(i), layers_[i]->il, layers_[i]->shape.n_kv_heads);
    if (!errors.keys.empty()) report.errors.push_back(errors);
  }
  return report;
}

bool Buffer::ReportAtExit(CacheReport* report) {
  const std::unique_lock lock(mutex, std::try_to_lock);  // a thread may still be computing
  if (!lock.owns_lock() || !cache_) return false;
  *report = Report();
  SaveFiles();
  if (report->memory.tokens > 0) Log(LogLevel::kInfo, "%s", ReportLine(*report).c_str());
  return true;
}

void Buffer::Refuse(const std::string& reason) {
  if (!refused_.exchange(true)) Log(LogLevel::kError, "%s", reason.c_str());
}

void Buffer::Break(const std::string& reason) {
  if (!broken_) Log(LogLevel::kError, "%s", reason.c_str());
  broken_ = true;
}

void Buffer::SetThreads(int n_threads) {
  if (!cache_ || n_threads == n_threads_) return;
  n_threads_ = n_threads;
  if (n_threads > 1 && !team_) sparkv_cache_set_team(cache_, team_ = HostTeam());
  sparkv_cache_set_threads(cache_, n_threads);
}

void Buffer::WarnUnknownRows() {
  const int64_t n = cache_ ? sparkv_cache_unknown_rows(cache_) : 0;
  if (n > unknown_rows_) {
    Log(LogLevel::kWarn,
        "%lld restored rows stay dense: their weights are not known here (SPARKV_WEIGHTS keeps "
        "them)",
        static_cast<long long>(n - unknown_rows_));
  }
  unknown_rows_ = n;
}

void Buffer::Clear(uint8_t value) {
  if (cache_) sparkv_cache_clear(cache_);
  broken_ = false;
  if (writable_) std::memset(base_, value, size_);
}

void Buffer::Read(const KvTensor& tensor, size_t begin, size_t size, uint8_t* bytes) {
  sparkv_cache* cache = cache_ ? Cache() : nullptr;
  if (!cache) {  // nothing was written yet, or nothing that may be trusted
    std::memset(bytes, 0, size);
    return;
  }
  // Who reads a state may keep it for another process, however this one ends.
  SaveWeights();
  const size_t row = tensor.row_bytes;
  const size_t first = begin / row;
  const size_t n = (begin + size + row - 1) / row - first;
  std::vector<uint16_t> rows(n * row / 2);
  const auto read = tensor.keys ? sparkv_cache_read_keys : sparkv_cache_read_values;
  sparkv_error error = {};
  if (read(cache, static_cast<int32_t>(tensor.layer), static_cast<int64_t>(first),
           static_cast<int64_t>(n), rows.data(), &error) != SPARKV_OK) {
    Break(std::string("reading the cache: ") + error.text);
  }
  std::memcpy(bytes, reinterpret_cast<const uint8_t*>(rows.data()) + (begin - first * row), size);
}

void Buffer::Write(const KvTensor& tensor, size_t begin, size_t size, const uint8_t* bytes) {
  sparkv_cache* cache = Cache();
  if (!cache) return;
  const size_t row = tensor.row_bytes;
  const size_t first = begin / row;
  const size_t n = (begin + size + row - 1) / row - first;
  std::vector<uint16_t> rows(n * row / 2);
  uint8_t* out = reinterpret_cast<uint8_t*>(rows.data());
  if (begin % row != 0 || size % row != 0)
    Read(tensor, first * row, n * row, out);  // keep the rest of these rows
  std::memcpy(out + (begin - first * row), bytes, size);
  const auto restore = tensor.keys ? sparkv_cache_restore_keys : sparkv_cache_restore_values;
  sparkv_error error = {};
  if (restore(cache, static_cast<int32_t>(tensor.layer), static_cast<int64_t>(first),
              static_cast<int64_t>(n), rows.data(), &error) != SPARKV_OK) {
    Break(std::string("restoring the cache: ") + error.text);
  }
}

bool Buffer::CopyStream(const KvTensor& tensor, int from, int to) {
  if (!cache_) return true;  // both are empty
  sparkv_cache* cache = Cache();
  if (!cache) return true;
  const auto copy = tensor.keys ? sparkv_cache_copy_keys : sparkv_cache_copy_values;
  sparkv_error error = {};
  if (copy(cache, static_cast<int32_t>(tensor.layer), from, to, &error) != SPARKV_OK) {
    Break(std::string("copying a sequence: ") + error.text);
  }
  return true;
}

// ---- ggml's side

namespace {

void FreeBuffer(ggml_backend_buffer_t buffer) { delete BufferOf(buffer); }

void* Base(ggml_backend_buffer_t buffer) { return BufferOf(buffer)->base(); }

ggml_status InitTensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  return BufferOf(buffer)->InitTensor(buffer, tensor);
}

void SetTensor(ggml_backend_buffer_t, ggml_tensor* tensor, const void* data, size_t offset,
               size_t size) {
  const KvTensor* kv = KvOf(tensor);
  if (!kv) {
    std::memcpy(static_cast<char*>(tensor->data) + offset, data, size);
    return;
  }
  const std::lock_guard lock(kv->buffer->mutex);
  kv->buffer->Write(*kv, BytesBegin(tensor, offset), size, static_cast<const uint8_t*>(data));
}

void GetTensor(ggml_backend_buffer_t, const ggml_tensor* tensor, void* data, size_t offset,
               size_t size) {
  const KvTensor* kv = KvOf(tensor);
  if (!kv) {
    std::memcpy(data, static_cast<const char*>(tensor->data) + offset, size);
    return;
  }
  const std::lock_guard lock(kv->buffer->mutex);
  kv->buffer->Read(*kv, BytesBegin(tensor, offset), size, static_cast<uint8_t*>(data));
}

void MemsetTensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, uint8_t value, size_t offset,
                  size_t size) {
  if (KvOf(tensor)) {
    const std::vector<uint8_t> bytes(size, value);
    SetTensor(buffer, tensor, bytes.data(), offset, size);
  } else {
    std::memset(static_cast<char*>(tensor->data) + offset, value, size);
  }
}

// Copies of one whole stream to another keep packed rows as they are; anything else goes through
// f16 rows.
bool CopyTensor(ggml_backend_buffer_t, const ggml_tensor* src, ggml_tensor* dst) {
  const KvTensor* from = KvOf(src);
  const KvTensor* to = KvOf(dst);
  if (!from || from != to) return false;
  const size_t stream = from->stream_bytes;
  const auto is_stream = [&](const ggml_tensor* t) {
    return t->view_src && t->view_offs % stream == 0 && t->ne[3] == 1 && t->ne[2] == 1 &&
           t->nb[1] == from->row_bytes && static_cast<size_t>(t->ne[0]) * 2 == from->row_bytes &&
           t->ne[1] == from->buffer->cells();
  };
  if (!is_stream(src) || !is_stream(dst)) return false;
  const std::lock_guard lock(from->buffer->mutex);
  return from->buffer->CopyStream(*from, static_cast<int>(src->view_offs / stream),
                                  static_cast<int>(dst->view_offs / stream));
}

void ClearBuffer(ggml_backend_buffer_t buffer, uint8_t value) {
  const std::lock_guard lock(BufferOf(buffer)->mutex);
  BufferOf(buffer)->Clear(value);
}

const char* TypeName(ggml_backend_buffer_type_t) { return "SPARKV"; }
size_t Alignment(ggml_backend_buffer_type_t) { return kAlignment; }
bool IsHost(ggml_backend_buffer_type_t) {
  return false;
}  // so that no other device reads packed bytes as f16

bool AnyRefused() {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  return std::any_of(registry.live.begin(), registry.live.end(),
                     [](const Buffer* b) { return b->refused(); });
}

ggml_backend_buffer_t Allocate(ggml_backend_buffer_type_t type, size_t size) {
  if (AnyRefused()) return nullptr;
  void* base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    Log(LogLevel::kError, "no address space for a buffer of %zu bytes", size);
    return nullptr;
  }
  ggml_backend_buffer_i calls = {};
  calls.free_buffer = FreeBuffer;
  calls.get_base = Base;
  calls.init_tensor = InitTensor;
  calls.memset_tensor = MemsetTensor;
  calls.set_tensor = SetTensor;
  calls.get_tensor = GetTensor;
  calls.cpy_tensor = CopyTensor;
  calls.clear = ClearBuffer;
  return ThePlugin().host.buffer_init(type, calls, new Buffer(base, size), size);
}

}  // namespace

ggml_backend_buffer_type_i BufferTypeInterface() {
  ggml_backend_buffer_type_i calls = {};
  calls.get_name = TypeName;
  calls.alloc_buffer = Allocate;
  calls.get_alignment = Alignment;
  calls.is_host = IsHost;
  return calls;
}

void ReportAllAtExit() {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  std::map<int, CacheReport> reports = registry.finished;
  bool any_live = false;
  for (Buffer* buffer : registry.live) {
    CacheReport report;
    if (!buffer->ReportAtExit(&report)) continue;
    any_live = true;
    reports[buffer->id()] = report;
  }
  const Options& options = ThePlugin().options;
  if (!options.saliency.empty() && !registry.has_picture && !reports.empty())
    Log(LogLevel::kError, "SPARKV_SALIENCY: no cache has a layer %d", options.saliency_layer);
  if (options.stats.empty() || (!any_live && !reports.empty())) return;
  std::vector<CacheReport> list;
  for (const auto& [id, report] : reports) list.push_back(report);
  WriteFile(options.stats, StatsJson(options, ThePlugin().isa, list));
}

}  // namespace sparkv

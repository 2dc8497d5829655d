// Buffers of the device. Each is a reservation of address space of the size the host asked for.
// Tensors of a compute graph live in it as in any memory. Tensors of a KV cache (cache_k_l<n>,
// cache_v_l<n>) are virtual: their addresses are never touched, what is written to them goes to the
// sparkv_cache of the buffer.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ggml-backend-impl.h"
#include "report.h"
#include "sparkv/sparkv.h"

namespace sparkv {

class Buffer;

// What ggml_tensor::extra of a virtual tensor points to.
struct KvTensor {
  Buffer* buffer;
  size_t layer;  // index into the layers of the buffer
  bool keys;
  size_t row_bytes;     // of one cell as the host counts, f16
  size_t stream_bytes;  // of all cells of one stream
};

// The virtual tensor that `tensor` is or views, or NULL.
const KvTensor* KvOf(const ggml_tensor* tensor);
// The same question by buffer type and name: also true for the dummies that `-fit` measures with.
bool IsCacheTensor(const ggml_tensor* tensor);
// True once any such tensor was seen.
bool SawCache();

class Buffer {
 public:
  Buffer(void* base, size_t size);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  ggml_status InitTensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor);
  void Clear(uint8_t value);
  // Bytes of a virtual tensor from `begin`. A failure breaks the buffer.
  void Write(const KvTensor& tensor, size_t begin, size_t size, const uint8_t* bytes);
  void Read(const KvTensor& tensor, size_t begin, size_t size, uint8_t* bytes);
  bool CopyStream(const KvTensor& tensor, int from, int to);

  // Head count and sizes of a layer, seen in the graphs that the host plans before it writes
  // anything. Returns "" or why the shape cannot be.
  std::string SetShape(size_t layer, const sparkv_layer_shape& shape);
  sparkv_layer_shape shape(size_t layer) const { return layers_[layer]->shape; }
  void* base() const { return base_; }
  int64_t cells() const { return cells_; }
  int64_t n_streams() const { return n_streams_; }

  // The cache, made at the first call. NULL when the buffer is broken.
  sparkv_cache* Cache();
  // Says once what `op` cannot do here. From then on the host gets no compute buffer, so that it
  // stops cleanly.
  void Refuse(const std::string& reason);
  bool refused() const { return refused_; }
  // A write or an op failed half way: nothing is computed from this cache until the host clears it.
  void Break(const std::string& reason);
  void SetThreads(int n_threads);
  void WarnUnknownRows();
  // There may be weights that no file has.
  void Computed() { weights_saved_ = false; }
  // At the end of the process, for a cache that its host never freed.
  bool ReportAtExit(CacheReport* report);
  int id() const { return id_; }

  std::mutex mutex;  // one user at a time; contended only by reports

 private:
  struct Layer {
    int il = 0;
    KvTensor keys = {}, values = {};
    sparkv_layer_shape shape = {};  // no heads: not seen yet
  };

  struct Shape;

  ggml_status InitCacheTensor(ggml_tensor* tensor, int il, bool keys);
  bool MakeWritable();
  bool FillShapes(std::string* reason);
  bool SolveBudget(sparkv_config* config, std::string* reason);
  bool Calibrate(std::string* reason);
  void LoadWeights();
  void SaveWeights();
  CacheReport Report() const;
  void SaveFiles();
  std::vector<sparkv_layer_shape> Shapes() const;
  bool SharesModel(const Buffer& other) const;

  void* base_;
  size_t size_;
  bool writable_ = false;
  std::vector<std::unique_ptr<Layer>> layers_;
  int64_t cells_ = 0;
  int64_t n_streams_ = 0;
  sparkv_cache* cache_ = nullptr;
  std::optional<sparkv_config> budgeted_;  // what a budget chose for this cache and its partner
  int id_ = 0;                             // of the cache, in order of creation
  int weights_slot_ = 0;
  int n_threads_ = 0;
  sparkv_team team_ = nullptr;
  int64_t unknown_rows_ = 0;
  bool weights_saved_ = false;
  size_t weights_hash_ = 0;
  std::atomic<bool> refused_{false};
  bool broken_ = false;
  bool pictured_ = false;
};

ggml_backend_buffer_type_i BufferTypeInterface();
// Files of the caches that live until the end of the process.
void ReportAllAtExit();

}  // namespace sparkv

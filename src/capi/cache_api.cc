// The cache behind C handles: arguments are checked here, once.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "cache/budget.h"
#include "cache/kv_cache.h"
#include "capi/guard.h"
#include "config/config.h"

struct sparkv_cache {
  std::unique_ptr<sparkv::KvCache> cache;
  std::vector<sparkv_layer_shape> layers;
  int64_t cells_per_stream = 0;
  int32_t n_streams = 0;
  int64_t cells() const { return cells_per_stream * n_streams; }
};

namespace sparkv {
namespace {

Status Outside(const char* field, int64_t value, int64_t low, int64_t high) {
  return Status::Invalid(std::string(field) + ": " + std::to_string(value) + " is outside [" +
                         std::to_string(low) + ", " + std::to_string(high) + "]");
}

Status CheckHandle(const sparkv_cache* cache) {
  return cache != nullptr ? Status::Ok() : Status::Invalid("cache: NULL");
}

Status CheckLayer(const sparkv_cache* cache, int32_t layer) {
  if (Status s = CheckHandle(cache); !s.ok()) return s;
  if (layer < 0 || size_t(layer) >= cache->layers.size())
    return Outside("layer", layer, 0, int64_t(cache->layers.size()) - 1);
  return Status::Ok();
}

Status CheckRange(const sparkv_cache* cache, int64_t first, int64_t n) {
  if (first < 0 || first > cache->cells()) return Outside("first", first, 0, cache->cells());
  if (n < 0 || n > cache->cells() - first) return Outside("n", n, 0, cache->cells() - first);
  return Status::Ok();
}

Status Write(sparkv_cache* cache, bool keys, int32_t layer, const int64_t* cells, int64_t n_rows,
             const void* rows, int32_t type, size_t row_stride) {
  if (Status s = CheckLayer(cache, layer); !s.ok()) return s;
  if (n_rows < 1 || n_rows > cache->cells()) return Outside("n_rows", n_rows, 1, cache->cells());
  if (cells == nullptr) return Status::Invalid("cells: NULL");
  if (rows == nullptr) return Status::Invalid("rows: NULL");
  if (type != SPARKV_ROW_F32 && type != SPARKV_ROW_F16) return Outside("type", type, 0, 1);
  std::unordered_set<int64_t> seen;
  for (int64_t i = 0; i < n_rows; ++i) {
    if (cells[i] >= cache->cells()) return Outside("cells", cells[i], -1, cache->cells() - 1);
    if (keys && n_rows > 1 && cells[i] >= 0 && !seen.insert(cells[i]).second) {
      return Status::Invalid("cells: " + std::to_string(cells[i]) + " is given twice");
    }
  }
  return cache->cache->Write(keys, layer, cells, n_rows, rows, sparkv_row_type(type), row_stride);
}

Status CheckAttend(const sparkv_cache* cache, const sparkv_attend_args* args) {
  if (Status s = CheckHandle(cache); !s.ok()) return s;
  if (args == nullptr) return Status::Invalid("args: NULL");
  if (args->struct_size != sizeof(*args))
    return Outside("args.struct_size", args->struct_size, sizeof(*args), sizeof(*args));
  if (Status s = CheckLayer(cache, args->layer); !s.ok()) return s;
  const sparkv_layer_shape& shape = cache->layers[size_t(args->layer)];
  if (args->first_stream < 0 || args->first_stream >= cache->n_streams) {
    return Outside("first_stream", args->first_stream, 0, cache->n_streams - 1);
  }
  if (args->n_streams < 1 || args->n_streams > cache->n_streams - args->first_stream) {
    return Outside("n_streams", args->n_streams, 1, cache->n_streams - args->first_stream);
  }
  if (args->n_kv < 1 || args->n_kv > cache->cells_per_stream)
    return Outside("n_kv", args->n_kv, 1, cache->cells_per_stream);
  if (args->n_tokens < 1 || args->n_tokens > (int64_t{1} << 24))
    return Outside("n_tokens", args->n_tokens, 1, 1 << 24);
  if (args->n_heads < 1 || args->n_heads % shape.n_kv_heads != 0) {
    return Status::Invalid("n_heads: " + std::to_string(args->n_heads) +
                           " is not a multiple of n_kv_heads " + std::to_string(shape.n_kv_heads));
  }
  if (args->q == nullptr) return Status::Invalid("q: NULL");
  if (args->out == nullptr) return Status::Invalid("out: NULL");
  if (args->q_head_stride % sizeof(float) != 0 || args->q_token_stride % sizeof(float) != 0 ||
      args->q_stream_stride % sizeof(float) != 0) {
    return Status::Invalid("q_*_stride: not a multiple of 4 bytes");
  }
  if (args->max_bias > 0.0f && args->mask == nullptr)
    return Status::Invalid("max_bias: needs a mask");
  return Status::Ok();
}

Status CheckShapeStruct(const sparkv_shape& shape) {
  if (shape.struct_size == sizeof(shape)) return Status::Ok();
  return Outside("shape.struct_size", shape.struct_size, sizeof(shape), sizeof(shape));
}

}  // namespace
}  // namespace sparkv

using sparkv::CheckShapeStruct;
using sparkv::Guard;
using sparkv::Status;

extern "C" {

sparkv_status sparkv_calibration_join(const void* const* parts, const size_t* part_sizes,
                                      int32_t n_parts, const char* model, const char* sensitivity,
                                      void* bytes, size_t* size, sparkv_error* error) {
  return Guard(error, [&] {
    if (parts == nullptr || part_sizes == nullptr || size == nullptr)
      return Status::Invalid("parts, part_sizes or size: NULL");
    if (n_parts < 1 || n_parts > 64) return sparkv::Outside("n_parts", n_parts, 1, 64);
    sparkv::Calibration joined;
    for (int32_t i = 0; i < n_parts; ++i) {
      sparkv::Calibration part;
      if (Status s = sparkv::ReadCalibration(parts[i], part_sizes[i], &part); !s.ok()) return s;
      std::move(part.layers.begin(), part.layers.end(), std::back_inserter(joined.layers));
    }
    joined.model = model != nullptr ? model : "";
    joined.sensitivity = sensitivity != nullptr ? sensitivity : "";
    const std::string whole = sparkv::CalibrationBytes(joined);
    // What was joined must stand what any file must.
    sparkv::Calibration read;
    if (Status s = sparkv::ReadCalibration(whole.data(), whole.size(), &read); !s.ok()) return s;
    if (read.model != joined.model || read.sensitivity != joined.sensitivity)
      return Status::Invalid("model or sensitivity: too long");
    if (bytes != nullptr && *size >= whole.size()) std::memcpy(bytes, whole.data(), whole.size());
    *size = whole.size();
    return Status::Ok();
  });
}

sparkv_status sparkv_calibration_model(const void* bytes, size_t size, char model[128],
                                       sparkv_error* error) {
  return Guard(error, [&] {
    if (bytes == nullptr || model == nullptr) return Status::Invalid("bytes or model: NULL");
    sparkv::Calibration read;
    if (Status s = sparkv::ReadCalibration(bytes, size, &read); !s.ok()) return s;
    std::memcpy(model, read.model.c_str(), read.model.size() + 1);
    return Status::Ok();
  });
}

sparkv_status sparkv_config_calibration(sparkv_config* config, const void* bytes, size_t size,
                                        sparkv_error* error) {
  return Guard(error, [&] {
    if (config == nullptr || bytes == nullptr)
      return Status::Invalid(config == nullptr ? "config: NULL" : "bytes: NULL");
    if (Status s = sparkv::CheckConfig(*config); !s.ok()) return s;
    sparkv::Calibration calibration;
    if (Status s = sparkv::ReadCalibration(bytes, size, &calibration); !s.ok()) return s;
    return sparkv::ApplyCalibration(calibration, config);
  });
}

sparkv_status sparkv_config_budget(const sparkv_config* config, const sparkv_shape* shapes,
                                   int32_t n_shapes, sparkv_config* out, sparkv_error* error) {
  return Guard(error, [&] {
    if (config == nullptr || out == nullptr)
      return Status::Invalid(config == nullptr ? "config: NULL" : "out: NULL");
    if (shapes == nullptr) return Status::Invalid("shapes: NULL");
    if (n_shapes < 1 || n_shapes > 64) return sparkv::Outside("n_shapes", n_shapes, 1, 64);
    if (Status s = sparkv::CheckConfig(*config); !s.ok()) return s;
    for (int32_t i = 0; i < n_shapes; ++i) {
      if (Status s = CheckShapeStruct(shapes[i]); !s.ok()) return s;
      if (Status s = sparkv::CheckShape(shapes[i]); !s.ok()) return s;
    }
    sparkv_config next = *config;
    if (Status s = sparkv::SolveBudget({shapes, size_t(n_shapes)}, &next); !s.ok()) return s;
    *out = next;
    return Status::Ok();
  });
}

sparkv_status sparkv_cache_create(const sparkv_config* config, const sparkv_shape* shape,
                                  sparkv_cache** cache, sparkv_error* error) {
  return Guard(error, [&] {
    if (config == nullptr) return Status::Invalid("config: NULL");
    if (shape == nullptr || cache == nullptr)
      return Status::Invalid(shape == nullptr ? "shape: NULL" : "cache: NULL");
    if (Status s = CheckShapeStruct(*shape); !s.ok()) return s;
    std::unique_ptr<sparkv_cache> made(new sparkv_cache());
    if (Status s = sparkv::KvCache::Create(*config, *shape, &made->cache); !s.ok()) return s;
    made->layers.assign(shape->layers, shape->layers + shape->n_layers);
    made->cells_per_stream = shape->cells_per_stream;
    made->n_streams = shape->n_streams;
    *cache = made.release();
    return Status::Ok();
  });
}

void sparkv_cache_free(sparkv_cache* cache) { delete cache; }

void sparkv_cache_clear(sparkv_cache* cache) {
  if (cache != nullptr)
    Guard(nullptr, [&] {
      cache->cache->Clear();
      return Status::Ok();
    });
}

void sparkv_cache_set_threads(sparkv_cache* cache, int32_t n_threads) {
  if (cache != nullptr)
    Guard(nullptr, [&] {
      cache->cache->SetThreads(n_threads);
      return Status::Ok();
    });
}

void sparkv_cache_set_team(sparkv_cache* cache, sparkv_team team) {
  if (cache != nullptr)
    Guard(nullptr, [&] {
      cache->cache->SetTeam(team);
      return Status::Ok();
    });
}

sparkv_status sparkv_cache_write_keys(sparkv_cache* cache, int32_t layer, const int64_t* cells,
                                      int64_t n_rows, const void* rows, int32_t type,
                                      size_t row_stride, sparkv_error* error) {
  return Guard(error, [&] {
    return sparkv::Write(cache, true, layer, cells, n_rows, rows, type, row_stride);
  });
}

sparkv_status sparkv_cache_write_values(sparkv_cache* cache, int32_t layer, const int64_t* cells,
                                        int64_t n_rows, const void* rows, int32_t type,
                                        size_t row_stride, sparkv_error* error) {
  return Guard(error, [&] {
    return sparkv::Write(cache, false, layer, cells, n_rows, rows, type, row_stride);
  });
}

sparkv_status sparkv_cache_attend(sparkv_cache* cache, const sparkv_attend_args* args,
                                  sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckAttend(cache, args); !s.ok()) return s;
    return cache->cache->Attend(*args);
  });
}

#define SPARKV_ROWS(name, call, pointer_type)                                      \
  sparkv_status name(sparkv_cache* cache, int32_t layer, int64_t first, int64_t n, \
                     pointer_type rows, sparkv_error* error) {                     \
    return Guard(error, [&] {                                                      \
      if (Status s = sparkv::CheckLayer(cache, layer); !s.ok()) return s;          \
      if (Status s = sparkv::CheckRange(cache, first, n); !s.ok()) return s;       \
      if (rows == nullptr) return Status::Invalid("rows: NULL");                   \
      return cache->cache->call;                                                   \
    });                                                                            \
  }
SPARKV_ROWS(sparkv_cache_read_keys, Read(true, layer, first, n, rows), uint16_t*)
SPARKV_ROWS(sparkv_cache_read_values, Read(false, layer, first, n, rows), uint16_t*)
SPARKV_ROWS(sparkv_cache_restore_keys, Restore(true, layer, first, n, rows), const uint16_t*)
SPARKV_ROWS(sparkv_cache_restore_values, Restore(false, layer, first, n, rows), const uint16_t*)
#undef SPARKV_ROWS

static sparkv_status Copy(sparkv_cache* cache, bool keys, int32_t layer, int32_t from, int32_t to,
                          sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckLayer(cache, layer); !s.ok()) return s;
    if (from < 0 || from >= cache->n_streams)
      return sparkv::Outside("from", from, 0, cache->n_streams - 1);
    if (to < 0 || to >= cache->n_streams) return sparkv::Outside("to", to, 0, cache->n_streams - 1);
    return cache->cache->CopyStream(keys, layer, from, to);
  });
}

sparkv_status sparkv_cache_copy_keys(sparkv_cache* cache, int32_t layer, int32_t from, int32_t to,
                                     sparkv_error* error) {
  return Copy(cache, true, layer, from, to, error);
}

sparkv_status sparkv_cache_copy_values(sparkv_cache* cache, int32_t layer, int32_t from, int32_t to,
                                       sparkv_error* error) {
  return Copy(cache, false, layer, from, to, error);
}

void sparkv_cache_release(sparkv_cache* cache, int64_t first, int64_t n) {
  if (cache == nullptr || n <= 0 || first < 0 || first >= cache->cells()) return;
  if (n > cache->cells() - first) n = cache->cells() - first;
  Guard(nullptr, [&] {
    cache->cache->Release(first, n);
    return Status::Ok();
  });
}

sparkv_status sparkv_cache_rotate_keys(sparkv_cache* cache, int32_t layer, const int32_t* delta,
                                       int64_t n_cells, const sparkv_rope* rope,
                                       sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckLayer(cache, layer); !s.ok()) return s;
    if (delta == nullptr || rope == nullptr)
      return Status::Invalid(delta == nullptr ? "delta: NULL" : "rope: NULL");
    if (rope->struct_size != sizeof(*rope)) {
      return sparkv::Outside("rope.struct_size", rope->struct_size, sizeof(*rope), sizeof(*rope));
    }
    if (Status s = sparkv::CheckRange(cache, 0, n_cells); !s.ok()) return s;
    const int32_t dim = cache->layers[size_t(layer)].k_dim;
    if (rope->n_rot < 2 || rope->n_rot > dim || rope->n_rot % 2 != 0)
      return sparkv::Outside("rope.n_rot", rope->n_rot, 2, dim);
    if (rope->first_channel < 0 || rope->first_channel > dim - rope->n_rot) {
      return sparkv::Outside("rope.first_channel", rope->first_channel, 0, dim - rope->n_rot);
    }
    return cache->cache->RotateKeys(layer, delta, n_cells, *rope);
  });
}

void sparkv_cache_memory(const sparkv_cache* cache, sparkv_memory* memory) {
  if (cache != nullptr && memory != nullptr) cache->cache->Memory(memory);
}

void sparkv_cache_high_water(const sparkv_cache* cache, sparkv_memory* memory) {
  if (cache != nullptr && memory != nullptr) {
    Guard(nullptr, [&] {
      cache->cache->HighWater(memory);
      return Status::Ok();
    });
  }
}

const char* sparkv_cache_isa(const sparkv_cache* cache) {
  return cache != nullptr ? cache->cache->isa() : "none";
}

int64_t sparkv_cache_unknown_rows(const sparkv_cache* cache) {
  return cache != nullptr ? cache->cache->unknown_rows() : 0;
}

size_t sparkv_cache_save_weights(const sparkv_cache* cache, void* bytes, size_t size) {
  size_t needed = 0;
  if (cache != nullptr)
    Guard(nullptr, [&] {
      needed = cache->cache->SaveWeights(bytes, size);
      return Status::Ok();
    });
  return needed;
}

sparkv_status sparkv_cache_load_weights(sparkv_cache* cache, const void* bytes, size_t size,
                                        sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckHandle(cache); !s.ok()) return s;
    if (bytes == nullptr) return Status::Invalid("bytes: NULL");
    return cache->cache->LoadWeights(bytes, size);
  });
}

sparkv_status sparkv_cache_start_calibration(sparkv_cache* cache, sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckHandle(cache); !s.ok()) return s;
    cache->cache->StartCalibration();
    return Status::Ok();
  });
}

size_t sparkv_cache_save_calibration(const sparkv_cache* cache, void* bytes, size_t size) {
  size_t needed = 0;
  if (cache != nullptr)
    Guard(nullptr, [&] {
      const std::string saved = sparkv::CalibrationBytes(cache->cache->Measured());
      needed = saved.size();
      if (bytes != nullptr && size >= needed) std::memcpy(bytes, saved.data(), needed);
      return Status::Ok();
    });
  return needed;
}

sparkv_status sparkv_cache_load_calibration(sparkv_cache* cache, const void* bytes, size_t size,
                                            sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckHandle(cache); !s.ok()) return s;
    if (bytes == nullptr) return Status::Invalid("bytes: NULL");
    return cache->cache->LoadCalibration(bytes, size);
  });
}

sparkv_status sparkv_cache_start_errors(sparkv_cache* cache, sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckHandle(cache); !s.ok()) return s;
    return cache->cache->StartErrors();
  });
}

sparkv_status sparkv_cache_errors(const sparkv_cache* cache, int32_t layer, int32_t kv_head,
                                  double* keys, double* values, sparkv_error* error) {
  return Guard(error, [&] {
    if (Status s = sparkv::CheckLayer(cache, layer); !s.ok()) return s;
    if (kv_head < 0 || kv_head >= cache->layers[size_t(layer)].n_kv_heads)
      return Status::Invalid("kv_head: " + std::to_string(kv_head) + " is none of layer " +
                             std::to_string(layer));
    if (keys == nullptr || values == nullptr)
      return Status::Invalid(keys == nullptr ? "keys: NULL" : "values: NULL");
    const sparkv::RowErrors* errors = cache->cache->Errors(layer);
    if (errors == nullptr) return Status::Invalid("errors: not measured");
    *keys = errors->Keys(kv_head);
    *values = errors->Values(kv_head);
    return Status::Ok();
  });
}

int64_t sparkv_cache_saliency(sparkv_cache* cache, int32_t layer, int32_t kv_head,
                              int64_t max_cells, float* saliency, uint8_t* kept) {
  int64_t n = 0;
  Guard(nullptr, [&] {
    if (Status s = sparkv::CheckLayer(cache, layer); !s.ok()) return s;
    if (kv_head < 0 || kv_head >= cache->layers[size_t(layer)].n_kv_heads)
      return Status::Invalid("kv_head");
    if (saliency == nullptr || kept == nullptr) return Status::Invalid("saliency: NULL");
    n = cache->cache->Saliency(layer, kv_head, max_cells, saliency, kept);
    return Status::Ok();
  });
  return n;
}

}  // extern "C"

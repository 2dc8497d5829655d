#include "graph.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "plugin.h"

namespace sparkv {
namespace {

constexpr int kRopeNormal = 0, kRopeNeox = 2;

std::atomic<bool> was_planned{false};

const Host& TheHost() { return ThePlugin().host; }

bool IsEmptyOp(ggml_op op) {
  const Host& host = TheHost();
  return op == host.none || op == host.reshape || op == host.view || op == host.permute ||
         op == host.transpose;
}

size_t ViewOffset(const ggml_tensor* tensor) { return tensor->view_src ? tensor->view_offs : 0; }

const char* RootName(const ggml_tensor* tensor) {
  return (tensor->view_src ? tensor->view_src : tensor)->name;
}

float FloatParam(const ggml_tensor* op, int i) {
  float value;
  std::memcpy(&value, op->op_params + i, sizeof(value));
  return value;
}

// The first of the op itself and its sources that is or views a KV tensor of this device.
const ggml_tensor* FindCacheTensor(const ggml_tensor* op) {
  if (IsCacheTensor(op)) return op;
  for (const ggml_tensor* src : op->src) {
    if (src && IsCacheTensor(src)) return src;
  }
  return nullptr;
}

// Each parser checks an op against what the cache can do and fills what the cache needs. Data
// pointers are valid only while a graph is computed; the checks are the same when it is planned. ""
// or why not.

struct RowsArgs {
  const KvTensor* kv;
  int64_t first_cell;  // cell of row 0 of the destination view
  int64_t n_rows;
  sparkv_row_type type;
  size_t row_stride;
  const void* rows;
};

std::string ParseSetRows(const ggml_tensor* op, RowsArgs* args) {
  const Host& host = TheHost();
  const ggml_tensor* rows = op->src[0];
  const ggml_tensor* cells = op->src[1];
  args->kv = KvOf(op);
  if (!args->kv) return "the rows come from the cache";
  const size_t row = args->kv->row_bytes;
  if (op->ne[0] == 1 && row != 2)
    return "values are stored transposed: flash attention is off, use -fa on";
  if (static_cast<size_t>(op->ne[0]) * 2 != row || op->nb[1] != row) return "rows of another width";
  if (rows->ne[2] != 1 || rows->ne[3] != 1 || ViewOffset(op) % row != 0)
    return "rows of several matrices";
  if (rows->type != host.f32 && rows->type != host.f16)
    return "rows of type " + std::string(host.type_name(rows->type));
  if (cells->type != host.i64 && cells->type != host.i32) return "cells of another type";
  args->first_cell = static_cast<int64_t>(ViewOffset(op) / row);
  args->n_rows = rows->ne[1];
  args->type = rows->type == host.f32 ? SPARKV_ROW_F32 : SPARKV_ROW_F16;
  args->row_stride = rows->nb[1];
  args->rows = rows->data;
  return "";
}

// The RoPE that made the queries, if it turns the first channels of each head and is of a known
// kind.
void FindQueryRope(const ggml_tensor* q, sparkv_attend_args* args) {
  const Host& host = TheHost();
  constexpr int kMostSteps = 6;
  for (int step = 0; q && step < kMostSteps; ++step) {
    if (q->op == host.rope) {
      const int32_t mode = q->op_params[2];
      if (mode != kRopeNormal && mode != kRopeNeox) return;
      args->rope_rot = q->op_params[1];
      args->rope_neox = mode == kRopeNeox;
      return;
    }
    q = q->view_src ? q->view_src : q->src[0];
  }
}

std::string ParseAttend(const ggml_tensor* op, const KvTensor** kv, sparkv_layer_shape* shape,
                        sparkv_attend_args* args) {
  const Host& host = TheHost();
  const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3],
                    *sinks = op->src[4];
  const KvTensor* keys = KvOf(k);
  const KvTensor* values = KvOf(v);
  if (!keys || !values || !keys->keys || keys->buffer != values->buffer)
    return "keys and values of different caches";
  if (values->keys) return "values are a view of the keys (MLA)";
  if (keys->layer != values->layer) return "keys and values of different layers";

  *kv = keys;
  *shape = {static_cast<int32_t>(k->ne[2]), static_cast<int32_t>(k->ne[0]),
            static_cast<int32_t>(v->ne[0])};
  const auto fits = [](const ggml_tensor* view,
                       const KvTensor* tensor) {  // [dim, n_kv, heads, streams] of whole rows
    const size_t head = static_cast<size_t>(view->ne[0]) * 2;
    return view->nb[0] == 2 && view->nb[1] == tensor->row_bytes && view->nb[2] == head &&
           head * static_cast<size_t>(view->ne[2]) == tensor->row_bytes &&
           (view->ne[3] == 1 || view->nb[3] == tensor->stream_bytes);
  };
  if (!fits(k, keys)) return "keys are not read as rows of cells";
  if (!fits(v, values))
    return "values are not read as rows of cells: flash attention is off, use -fa on";
  if (k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[3] != v->ne[3] ||
      k->ne[3] != q->ne[3]) {
    return "keys and values of different shapes";
  }
  const size_t first_stream = ViewOffset(k) / keys->stream_bytes;
  if (ViewOffset(k) % keys->stream_bytes != 0 ||
      ViewOffset(v) != first_stream * values->stream_bytes) {
    return "the view does not start at cell 0";
  }
  if (q->type != host.f32 || op->type != host.f32)
    return "queries of type " + std::string(host.type_name(q->type));
  if (q->ne[0] != k->ne[0] || q->nb[0] != 4 || q->ne[2] % k->ne[2] != 0)
    return "queries of another shape";
  if (mask) {
    if (mask->type != host.f16 || mask->nb[0] != 2)
      return "a mask of type " + std::string(host.type_name(mask->type));
    if (mask->ne[2] != 1) return "one mask per head";
    if (mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1] ||
        (mask->ne[3] != 1 && mask->ne[3] != q->ne[3])) {
      return "a mask of another shape";
    }
  }
  if (sinks && (sinks->type != host.f32 || sinks->ne[0] != q->ne[2]))
    return "sinks of another shape";

  *args = {};
  args->struct_size = sizeof(*args);
  args->layer = static_cast<int32_t>(keys->layer);
  args->first_stream = static_cast<int32_t>(first_stream);
  args->n_streams = static_cast<int32_t>(q->ne[3]);
  args->n_kv = k->ne[1];
  args->n_tokens = q->ne[1];
  args->n_heads = static_cast<int32_t>(q->ne[2]);
  args->scale = FloatParam(op, 0);
  args->max_bias = FloatParam(op, 1);
  args->softcap = FloatParam(op, 2);
  args->q = static_cast<const float*>(q->data);
  args->q_token_stride = q->nb[1];
  args->q_head_stride = q->nb[2];
  args->q_stream_stride = q->nb[3];
  if (mask) {
    args->mask = static_cast<const uint16_t*>(mask->data);
    args->mask_token_stride = mask->nb[1];
    args->mask_stream_stride = mask->ne[3] == 1 ? 0 : mask->nb[3];
  }
  args->sinks = sinks ? static_cast<const float*>(sinks->data) : nullptr;
  FindQueryRope(q, args);
  args->out = static_cast<float*>(op->data);
  return "";
}

std::string ParseRope(const ggml_tensor* op, const KvTensor** kv, sparkv_rope* rope) {
  const Host& host = TheHost();
  const ggml_tensor *view = op->src[0], *shift = op->src[1], *factors = op->src[2];
  *kv = KvOf(op);
  if (!*kv || !(*kv)->keys || KvOf(view) != *kv || ViewOffset(view) != ViewOffset(op))
    return "not a shift of keys";
  const int32_t n_rot = op->op_params[1], mode = op->op_params[2];
  // channels are rotated from where the view starts in the first head, plus an offset within the
  // view
  const size_t first = ViewOffset(view) / 2 + static_cast<size_t>(op->op_params[15]);
  if (mode != kRopeNormal && mode != kRopeNeox) return "RoPE of mode " + std::to_string(mode);
  const sparkv_layer_shape shape = (*kv)->buffer->shape((*kv)->layer);
  const Buffer& buffer = *(*kv)->buffer;
  if (view->nb[2] != (*kv)->row_bytes || view->ne[2] != buffer.cells() * buffer.n_streams() ||
      view->ne[3] != 1 ||
      view->ne[1] * static_cast<int64_t>(view->nb[1]) != static_cast<int64_t>(view->nb[2]) ||
      (shape.n_kv_heads != 0 && view->ne[1] != shape.n_kv_heads) || n_rot <= 0 ||
      n_rot > view->ne[0] || (first + static_cast<size_t>(n_rot)) * 2 > view->nb[1]) {
    return "the view is not all cells";
  }
  if (shift->type != host.i32 || shift->ne[0] != view->ne[2] || shift->nb[0] != 4)
    return "shifts of another shape";
  if (factors && (factors->type != host.f32 || factors->ne[0] < n_rot / 2))
    return "factors of another shape";

  *rope = {};
  rope->struct_size = sizeof(*rope);
  rope->n_rot = n_rot;
  rope->first_channel = static_cast<int32_t>(first);
  rope->neox = mode == kRopeNeox;
  rope->n_ctx_orig = op->op_params[4];
  rope->freq_base = FloatParam(op, 5);
  rope->freq_scale = FloatParam(op, 6);
  rope->ext_factor = FloatParam(op, 7);
  rope->attn_factor = FloatParam(op, 8);
  rope->beta_fast = FloatParam(op, 9);
  rope->beta_slow = FloatParam(op, 10);
  rope->freq_factors = factors ? static_cast<const float*>(factors->data) : nullptr;
  return "";
}

// Why the device cannot do `op`, "" when it can. Learns head sizes on the way.
std::string Check(const ggml_tensor* op) {
  const Host& host = TheHost();
  if (op->op == host.set_rows) {
    RowsArgs args;
    return ParseSetRows(op, &args);
  }
  if (op->op == host.flash_attn_ext) {
    const KvTensor* kv = nullptr;
    sparkv_layer_shape shape;
    sparkv_attend_args args;
    const std::string reason = ParseAttend(op, &kv, &shape, &args);
    return reason.empty() ? kv->buffer->SetShape(kv->layer, shape) : reason;
  }
  if (op->op == host.rope) {
    const KvTensor* kv = nullptr;
    sparkv_rope rope;
    return ParseRope(op, &kv, &rope);
  }
  return "attention without FLASH_ATTN_EXT: use -fa on, and -ctk and -ctv f16";
}

std::string Describe(const ggml_tensor* op, const std::string& reason) {
  return std::string(TheHost().op_name(op->op)) + " on " + RootName(FindCacheTensor(op)) + ": " +
         reason;
}

std::string SetRows(const ggml_tensor* op) {
  RowsArgs args;
  if (std::string reason = ParseSetRows(op, &args); !reason.empty()) return reason;
  const Host& host = TheHost();
  const ggml_tensor* index = op->src[1];
  std::vector<int64_t> cells(static_cast<size_t>(args.n_rows));
  for (size_t i = 0; i < cells.size(); ++i) {
    const char* at = static_cast<const char*>(index->data) + i * index->nb[0];
    if (index->type == host.i64) {
      std::memcpy(&cells[i], at, sizeof(int64_t));
    } else {
      int32_t cell;
      std::memcpy(&cell, at, sizeof(cell));
      cells[i] = cell;
    }
    cells[i] += args.first_cell;
  }
  const auto write = args.kv->keys ? sparkv_cache_write_keys : sparkv_cache_write_values;
  sparkv_error error = {};
  const sparkv_status status =
      write(args.kv->buffer->Cache(), static_cast<int32_t>(args.kv->layer), cells.data(),
            args.n_rows, args.rows, args.type, args.row_stride, &error);
  return status == SPARKV_OK ? "" : error.text;
}

std::string Attend(const ggml_tensor* op) {
  const KvTensor* kv = nullptr;
  sparkv_layer_shape shape;
  sparkv_attend_args args;
  if (std::string reason = ParseAttend(op, &kv, &shape, &args); !reason.empty()) return reason;
  if (std::string reason = kv->buffer->SetShape(kv->layer, shape); !reason.empty()) return reason;
  sparkv_error error = {};
  return sparkv_cache_attend(kv->buffer->Cache(), &args, &error) == SPARKV_OK ? "" : error.text;
}

std::string Rotate(const ggml_tensor* op) {
  const KvTensor* kv = nullptr;
  sparkv_rope rope;
  if (std::string reason = ParseRope(op, &kv, &rope); !reason.empty()) return reason;
  const ggml_tensor* shift = op->src[1];
  sparkv_error error = {};
  const sparkv_status status = sparkv_cache_rotate_keys(
      kv->buffer->Cache(), static_cast<int32_t>(kv->layer),
      static_cast<const int32_t*>(shift->data), shift->ne[0], &rope, &error);
  return status == SPARKV_OK ? "" : error.text;
}

ggml_status ComputeNode(const Backend& backend, const ggml_tensor* op) {
  const ggml_tensor* cached = FindCacheTensor(op);
  const KvTensor* kv = cached ? KvOf(cached) : nullptr;
  if (!kv) {
    Log(LogLevel::kError, "%s: not an op of this device", TheHost().op_name(op->op));
    return GGML_STATUS_FAILED;
  }
  Buffer& buffer = *kv->buffer;
  const std::lock_guard lock(buffer.mutex);
  if (!buffer.Cache()) return GGML_STATUS_FAILED;
  buffer.SetThreads(backend.n_threads);

  const Host& host = TheHost();
  std::string reason;
  if (op->op == host.set_rows) {
    if (kv->layer == 0) buffer.WarnUnknownRows();
    reason = SetRows(op);
  } else if (op->op == host.flash_attn_ext) {
    reason = Attend(op);
  } else if (op->op == host.rope) {
    reason = Rotate(op);
  } else {
    reason = Check(op);
  }
  buffer.Computed();
  if (reason.empty()) return GGML_STATUS_SUCCESS;
  buffer.Break(Describe(op, reason));
  return GGML_STATUS_FAILED;
}

}  // namespace

bool WasPlanned() { return was_planned; }

bool SupportsOp(const ggml_tensor* op) {
  was_planned = true;
  const ggml_tensor* cached = FindCacheTensor(op);
  if (!cached) {
    // Other tensors in our buffers (copies of a state) are only stored; the host computes them
    // elsewhere.
    const ggml_tensor* root = op->view_src ? op->view_src : op;
    return IsEmptyOp(op->op) && root->buffer && root->buffer->buft == &ThePlugin().buffer_type;
  }
  if (IsEmptyOp(op->op)) return true;
  const KvTensor* kv = KvOf(cached);
  if (kv) {  // else the dummy of a measurement
    const std::lock_guard lock(kv->buffer->mutex);
    if (const std::string reason = Check(op); !reason.empty())
      kv->buffer->Refuse(Describe(op, reason));
  }
  return true;
}

ggml_status Compute(ggml_backend_t backend, ggml_cgraph* graph) {
  const Host& host = TheHost();
  const Backend& ours = *static_cast<const Backend*>(backend->context);
  const int n = host.graph_n_nodes(graph);
  for (int i = 0; i < n; ++i) {
    const ggml_tensor* node = host.graph_node(graph, i);
    if (IsEmptyOp(node->op) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
    if (const ggml_status status = ComputeNode(ours, node); status != GGML_STATUS_SUCCESS)
      return status;
  }
  return GGML_STATUS_SUCCESS;
}

}  // namespace sparkv

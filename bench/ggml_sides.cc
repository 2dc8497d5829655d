// The opponents, as llama.cpp builds them: heads of a token are contiguous in the cache.
#include "bench.h"

#ifdef SPARKV_BENCH_GGML
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace sparkv::bench {
namespace {

constexpr ggml_type kTypes[] = {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};

std::string NameOf(ggml_type type) { return std::string("ggml-") + ggml_type_name(type); }

ggml_type TypeOf(const std::string& name) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes),
                       [&](ggml_type type) { return NameOf(type) == name; });
}

// Tensors and the graph over them, in memory of the CPU backend.
class Graph {
 public:
  Graph() : backend_(ggml_backend_cpu_init()) {
    const ggml_init_params params{ggml_tensor_overhead() * 32 + ggml_graph_overhead(), nullptr,
                                  true};
    context = ggml_init(params);
    graph_ = ggml_new_graph(context);
  }
  ~Graph() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(context);
    ggml_backend_free(backend_);
  }
  Graph(const Graph&) = delete;
  void operator=(const Graph&) = delete;

  void Add(ggml_tensor* result) { ggml_build_forward_expand(graph_, result); }
  void Allocate() {
    buffer_ = ggml_backend_alloc_ctx_tensors(context, backend_);
    if (buffer_ == nullptr) Fail(1, "ggml: no memory for its rows");
  }
  void SetThreads(int n) { ggml_backend_cpu_set_n_threads(backend_, n); }
  void Compute() {
    if (ggml_backend_graph_compute(backend_, graph_) != GGML_STATUS_SUCCESS)
      Fail(1, "ggml: a graph failed");
  }

  ggml_context* context;

 private:
  ggml_backend_t backend_;
  ggml_backend_buffer_t buffer_ = nullptr;
  ggml_cgraph* graph_;
};

template <typename T>
void Set(ggml_tensor* tensor, const std::vector<T>& numbers) {
  ggml_backend_tensor_set(tensor, numbers.data(), 0, ggml_nbytes(tensor));
}

class AttendSide : public Side {
 public:
  explicit AttendSide(const Case& c) : type_(TypeOf(c.side)) {
    const int64_t row = int64_t(c.shape.row()), cells = int64_t{c.tokens} * c.sequences;
    for (ggml_tensor** cached : {&k_, &v_}) {
      *cached = ggml_new_tensor_2d(rows_.context, type_, row, cells);
    }
    rows_.Allocate();
    for (const bool keys : {true, false}) {
      const std::vector<uint16_t> half = Rows(c.shape, c.tokens, keys);
      const size_t bytes = ggml_row_size(type_, row) * size_t(c.tokens);
      std::vector<uint8_t> packed;
      if (type_ != GGML_TYPE_F16) {
        packed.resize(bytes);
        ggml_quantize_chunk(type_, ToFloats(half).data(), packed.data(), 0, c.tokens, row, nullptr);
      }
      for (int s = 0; s < c.sequences; ++s) {
        ggml_backend_tensor_set(keys ? k_ : v_,
                                packed.empty() ? (const void*)half.data() : packed.data(),
                                bytes * size_t(s), bytes);
      }
    }
  }

  // Turns of one side differ in their queries: each number has a graph over the same rows.
  void Prepare(const Case& c) override {
    std::unique_ptr<Graph>& graph = graphs_[c.queries];
    if (graph == nullptr) graph = MakeGraph(c);
    graph->SetThreads(c.threads);
    current_ = graph.get();
  }
  void Step() override { current_->Compute(); }
  double bytes() const override { return double(ggml_nbytes(k_) + ggml_nbytes(v_)); }

 private:
  std::unique_ptr<Graph> MakeGraph(const Case& c) const {
    auto graph = std::make_unique<Graph>();
    ggml_context* context = graph->context;
    const int64_t streams = c.unified() ? 1 : c.sequences, dim = c.shape.dim,
                  n_kv = int64_t{c.tokens} * c.sequences / streams,
                  rows = int64_t{c.queries} * c.sequences, queries = rows / streams;
    ggml_tensor* q =
        ggml_new_tensor_4d(context, GGML_TYPE_F32, dim, c.shape.n_heads(), queries, streams);
    ggml_tensor* mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, n_kv, queries);
    const auto heads = [&](ggml_tensor* x) {
      return ggml_view_4d(context, x, dim, n_kv, c.shape.kv_heads, streams, x->nb[1],
                          ggml_row_size(type_, dim), x->nb[1] * size_t(n_kv), 0);
    };
    graph->Add(ggml_flash_attn_ext(context, ggml_permute(context, q, 0, 2, 1, 3), heads(k_),
                                   heads(v_), mask, 1.0f / std::sqrt(float(dim)), 0.0f, 0.0f));
    graph->Allocate();
    Set(q, Queries(c.shape, int(rows)));
    std::vector<uint16_t> entries(size_t(n_kv * queries), c.unified() ? 0xfc00 : 0);
    for (int64_t row = 0; c.unified() && row < rows; ++row) {
      for (int64_t i = 0; i < c.tokens; ++i)
        entries[size_t(row * n_kv + c.CellOf(int(row / c.queries), i))] = 0;
    }
    Set(mask, entries);
    return graph;
  }

  ggml_type type_;
  Graph rows_;
  ggml_tensor *k_ = nullptr, *v_ = nullptr;
  std::map<int, std::unique_ptr<Graph>> graphs_;
  Graph* current_ = nullptr;
};

class AppendSide : public Side {
 public:
  explicit AppendSide(const Case& c) {
    const ggml_type type = TypeOf(c.side);
    const int64_t row = int64_t(c.shape.row());
    ggml_tensor* cells = ggml_new_tensor_1d(graph_.context, GGML_TYPE_I64, c.queries);
    ggml_tensor* from[2];
    for (ggml_tensor*& rows : from) {
      rows = ggml_new_tensor_2d(graph_.context, GGML_TYPE_F32, row, c.queries);
      ggml_tensor* to = ggml_new_tensor_2d(graph_.context, type, row, c.queries);
      graph_.Add(ggml_set_rows(graph_.context, to, rows, cells));
      bytes_ += double(ggml_nbytes(rows) + ggml_nbytes(to));
    }
    graph_.Allocate();
    graph_.SetThreads(c.threads);
    for (const bool keys : {true, false}) Set(from[keys], ToFloats(Rows(c.shape, c.queries, keys)));
    std::vector<int64_t> numbers(size_t(c.queries));
    std::iota(numbers.begin(), numbers.end(), 0);
    Set(cells, numbers);
  }
  void Step() override { graph_.Compute(); }
  double bytes() const override { return bytes_; }

 private:
  Graph graph_;
  double bytes_ = 0.0;
};

}  // namespace

std::vector<std::string> GgmlNames(const Shape& shape) {
  std::vector<std::string> names;
  for (const ggml_type type : kTypes) {
    if (shape.dim % ggml_blck_size(type) == 0) names.push_back(NameOf(type));
  }
  return names;
}
std::unique_ptr<Side> GgmlAttend(const Case& c) { return std::make_unique<AttendSide>(c); }
std::unique_ptr<Side> GgmlAppend(const Case& c) { return std::make_unique<AppendSide>(c); }

}  // namespace sparkv::bench
#else

namespace sparkv::bench {

std::vector<std::string> GgmlNames(const Shape&) { return {}; }
std::unique_ptr<Side> GgmlAttend(const Case&) { return nullptr; }
std::unique_ptr<Side> GgmlAppend(const Case&) { return nullptr; }

}  // namespace sparkv::bench
#endif

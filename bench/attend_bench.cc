// One decode step of attention over one layer: packed caches beside our dense f16 one (`exact`) and
// ggml's FLASH_ATTN_EXT over f16, q8_0 and q4_0 tensors of the same shape. Time it with
// interleaving, or sides drift apart on a shared machine:
//   attend_bench --tokens=8192 --dim=64 --kv-heads=3 --group=3
// Every row names the bytes it has to read and, as `x_bound`, its time over those bytes at the
// bandwidth measured at the start.
#include <benchmark/benchmark.h>

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "sparkv/sparkv.h"
#ifdef SPARKV_BENCH_GGML
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#endif

namespace sparkv {
namespace {

struct Shape {
  int tokens = 8192, dim = 64, kv_heads = 3, group = 3, threads = 1;
  int n_heads() const { return kv_heads * group; }
};

void Check(sparkv_status status, const sparkv_error& error) {
  if (status == SPARKV_OK) return;
  std::cerr << "attend_bench: " << error.text << "\n";
  std::exit(1);
}

// Rows that look like keys: a few channels are much larger than the others.
std::vector<uint16_t> Rows(const Shape& shape, bool keys, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> cycle(1 << 16);
  for (float& x : cycle) x = normal(rng);
  const size_t row = size_t(shape.kv_heads) * size_t(shape.dim);
  std::vector<uint16_t> rows(row * size_t(shape.tokens));
  for (size_t i = 0; i < rows.size(); ++i) {
    const float outlier = keys && i % 19 == 0 ? 4.0f : 1.0f;
    rows[i] = FloatToHalf(outlier * cycle[(i + i / 40503) % cycle.size()]);
  }
  return rows;
}

std::vector<float> Queries(const Shape& shape) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t(shape.n_heads()) * size_t(shape.dim));
  for (float& x : q) x = normal(rng);
  return q;
}

// Bytes per second of one thread that reads memory front to back.
double Bandwidth() {
  std::vector<uint64_t> memory((size_t{256} << 20) / 8, 1);
  double best = 0.0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    uint64_t sum[8] = {};
    for (size_t i = 0; i < memory.size(); i += 8) {
      for (size_t k = 0; k < 8; ++k) sum[k] += memory[i + k];
    }
    benchmark::DoNotOptimize(sum);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(memory.size() * 8) / time.count());
  }
  return best;
}

class Packed {
 public:
  Packed(const Shape& shape, const std::string& preset) : shape_(shape), q_(Queries(shape)) {
    sparkv_config config{};
    config.struct_size = sizeof(config);
    sparkv_error error{};
    Check(sparkv_config_preset(&config, preset.c_str(), &error), error);
    config.threads = shape.threads;
    sparkv_layer_shape layer{shape.kv_heads, shape.dim, shape.dim};
    sparkv_shape cells{};
    cells.struct_size = sizeof(cells);
    cells.n_layers = 1;
    cells.layers = &layer;
    cells.cells_per_stream = shape.tokens;
    cells.n_streams = 1;
    Check(sparkv_cache_create(&config, &cells, &cache_, &error), error);
    Fill();
    sparkv_memory memory{};
    memory.struct_size = sizeof(memory);
    sparkv_cache_memory(cache_, &memory);
    bytes_ = memory.bits / 16.0 * double(memory.f16_bytes);
  }
  ~Packed() { sparkv_cache_free(cache_); }

  double bytes() const { return bytes_; }
  void Step() { Attend(1, shape_.tokens, nullptr, 0); }

 private:
  // A query sees the 256 tokens before it, so that filling takes time linear in the tokens.
  void Fill() {
    constexpr int64_t kBatch = 128, kSees = 256;
    const std::vector<uint16_t> keys = Rows(shape_, true, 1), values = Rows(shape_, false, 2);
    const size_t row = size_t(shape_.kv_heads) * size_t(shape_.dim), n_kv = size_t(shape_.tokens);
    constexpr uint16_t kHidden = 0xfc00;
    std::vector<uint16_t> mask(size_t(kBatch) * n_kv, kHidden);
    std::vector<int64_t> cells;
    sparkv_error error{};
    for (int64_t first = 0; first < shape_.tokens; first += kBatch) {
      const int64_t n = std::min<int64_t>(kBatch, shape_.tokens - first);
      cells.clear();
      for (int64_t t = 0; t < n; ++t) cells.push_back(first + t);
      const auto sees = [&](uint16_t entry) {
        for (int64_t t = 0; t < n; ++t) {
          for (int64_t c = std::max<int64_t>(0, first + t - kSees); c <= first + t; ++c)
            mask[size_t(t) * n_kv + size_t(c)] = entry;
        }
      };
      sees(0);
      const size_t at = size_t(first) * row;
      Check(sparkv_cache_write_keys(cache_, 0, cells.data(), n, keys.data() + at, SPARKV_ROW_F16,
                                    row * 2, &error),
            error);
      Check(sparkv_cache_write_values(cache_, 0, cells.data(), n, values.data() + at,
                                      SPARKV_ROW_F16, row * 2, &error),
            error);
      Attend(n, int64_t(n_kv), mask.data(), n_kv * 2);
      sees(kHidden);
    }
  }

  void Attend(int64_t n_tokens, int64_t n_kv, const uint16_t* mask, size_t mask_stride) {
    out_.resize(size_t(n_tokens) * q_.size());
    sparkv_attend_args args{};
    args.struct_size = sizeof(args);
    args.n_streams = 1;
    args.n_kv = n_kv;
    args.n_tokens = n_tokens;
    args.n_heads = shape_.n_heads();
    args.scale = 1.0f / std::sqrt(float(shape_.dim));
    args.q = q_.data();  // all tokens of a batch ask the same
    args.q_head_stride = size_t(shape_.dim) * sizeof(float);
    args.mask = mask;
    args.mask_token_stride = mask_stride;
    args.out = out_.data();
    sparkv_error error{};
    Check(sparkv_cache_attend(cache_, &args, &error), error);
  }

  Shape shape_;
  sparkv_cache* cache_ = nullptr;
  std::vector<float> q_, out_;
  double bytes_ = 0.0;
};

#ifdef SPARKV_BENCH_GGML
// FLASH_ATTN_EXT as llama.cpp builds it: heads of a token are contiguous in the cache.
class Ggml {
 public:
  Ggml(const Shape& shape, ggml_type type) : backend_(ggml_backend_cpu_init()) {
    ggml_backend_cpu_set_n_threads(backend_, shape.threads);
    ggml_init_params params{ggml_tensor_overhead() * 32 + ggml_graph_overhead(), nullptr, true};
    context_ = ggml_init(params);
    const int64_t row = int64_t(shape.dim) * shape.kv_heads;
    ggml_tensor* k = ggml_new_tensor_2d(context_, type, row, shape.tokens);
    ggml_tensor* v = ggml_new_tensor_2d(context_, type, row, shape.tokens);
    ggml_tensor* q = ggml_new_tensor_3d(context_, GGML_TYPE_F32, shape.dim, 1, shape.n_heads());
    ggml_tensor* mask = ggml_new_tensor_2d(context_, GGML_TYPE_F16, shape.tokens, 1);
    const auto heads = [&](ggml_tensor* x) {
      return ggml_view_3d(context_, x, shape.dim, shape.tokens, shape.kv_heads, x->nb[1],
                          ggml_row_size(type, shape.dim), 0);
    };
    ggml_tensor* out = ggml_flash_attn_ext(context_, q, heads(k), heads(v), mask,
                                           1.0f / std::sqrt(float(shape.dim)), 0.0f, 0.0f);
    graph_ = ggml_new_graph(context_);
    ggml_build_forward_expand(graph_, out);
    buffer_ = ggml_backend_alloc_ctx_tensors(context_, backend_);
    for (const bool keys : {true, false}) {
      const std::vector<uint16_t> half = Rows(shape, keys, keys ? 1 : 2);
      ggml_tensor* to = keys ? k : v;
      if (type == GGML_TYPE_F16) {
        ggml_backend_tensor_set(to, half.data(), 0, ggml_nbytes(to));
        continue;
      }
      std::vector<float> rows(half.size());
      for (size_t i = 0; i < half.size(); ++i) rows[i] = HalfToFloat(half[i]);
      std::vector<uint8_t> bytes(ggml_nbytes(to));
      ggml_quantize_chunk(type, rows.data(), bytes.data(), 0, shape.tokens, row, nullptr);
      ggml_backend_tensor_set(to, bytes.data(), 0, bytes.size());
    }
    const std::vector<float> queries = Queries(shape);
    ggml_backend_tensor_set(q, queries.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(mask, std::vector<uint16_t>(size_t(shape.tokens), 0).data(), 0,
                            ggml_nbytes(mask));
    bytes_ = double(ggml_nbytes(k) + ggml_nbytes(v));
  }
  ~Ggml() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(context_);
    ggml_backend_free(backend_);
  }

  double bytes() const { return bytes_; }
  void Step() { ggml_backend_graph_compute(backend_, graph_); }

 private:
  ggml_backend_t backend_;
  ggml_backend_buffer_t buffer_ = nullptr;
  ggml_context* context_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  double bytes_ = 0.0;
};
#endif

template <typename Side>
void Run(benchmark::State& state, Side& side, double bandwidth) {
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) side.Step();
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  const double step = time.count() / double(state.iterations());
  state.counters["MiB"] = side.bytes() / (1 << 20);
  state.counters["GB/s"] = side.bytes() / step / 1e9;
  state.counters["x_bound"] = step * bandwidth / side.bytes();
}

// --name=number
bool Take(const char* arg, const char* name, int* number) {
  const std::string start = std::string("--") + name + "=";
  if (std::strncmp(arg, start.c_str(), start.size()) != 0) return false;
  const char* text = arg + start.size();
  const auto [end, failed] = std::from_chars(text, text + std::strlen(text), *number);
  if (failed == std::errc() && *end == 0 && *number > 0) return true;
  std::cerr << "attend_bench: " << arg << ": a number above 0 is needed\n";
  std::exit(2);
}

int Main(int argc, char** argv) {
  std::vector<char*> args(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true",
       repeat[] = "--benchmark_repetitions=9",
       aggregates[] = "--benchmark_report_aggregates_only=true",
       unit[] = "--benchmark_time_unit=us", least[] = "--benchmark_min_time=0.1";
  args.insert(args.begin() + 1, {interleave, repeat, aggregates, unit, least});
  int n = int(args.size());
  benchmark::Initialize(&n, args.data());
  Shape shape;
  for (int i = 1; i < n; ++i) {
    char* arg = args[size_t(i)];
    if (!Take(arg, "tokens", &shape.tokens) && !Take(arg, "dim", &shape.dim) &&
        !Take(arg, "kv-heads", &shape.kv_heads) && !Take(arg, "group", &shape.group) &&
        !Take(arg, "threads", &shape.threads)) {
      std::cerr
          << "attend_bench: " << arg
          << ": unknown; --tokens --dim --kv-heads --group --threads, or Google Benchmark's\n";
      return 2;
    }
  }
  const double bandwidth = Bandwidth();
  benchmark::AddCustomContext(
      "shape", std::to_string(shape.tokens) + " tokens, head size " + std::to_string(shape.dim) +
                   ", " + std::to_string(shape.kv_heads) + " KV heads, group " +
                   std::to_string(shape.group) + ", " + std::to_string(shape.threads) + " threads");
  benchmark::AddCustomContext("one thread reads", std::to_string(bandwidth / 1e9) + " GB/s");
  // A side is made when its turn comes first, so that a filter saves time and memory.
  std::map<std::string, std::unique_ptr<Packed>> packed;
  for (const std::string preset :
       {"exact", "spark-0.5", "spark-0.5-i8", "spark-0.5-i5", "spark-0.8-i4"}) {
    benchmark::RegisterBenchmark(("sparkv/" + preset).c_str(),
                                 [&, preset](benchmark::State& state) {
                                   auto& side = packed[preset];
                                   if (!side) side = std::make_unique<Packed>(shape, preset);
                                   Run(state, *side, bandwidth);
                                 });
  }
#ifdef SPARKV_BENCH_GGML
  std::map<ggml_type, std::unique_ptr<Ggml>> dense;
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    benchmark::RegisterBenchmark((std::string("ggml/") + ggml_type_name(type)).c_str(),
                                 [&, type](benchmark::State& state) {
                                   auto& side = dense[type];
                                   if (!side) side = std::make_unique<Ggml>(shape, type);
                                   Run(state, *side, bandwidth);
                                 });
  }
#endif
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace sparkv

int main(int argc, char** argv) { return sparkv::Main(argc, argv); }

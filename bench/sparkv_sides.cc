// Our cache through its C header, and packing alone through the table of kernels.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/half.h"
#include "base/thread_pool.h"
#include "bench.h"
#include "cache/cache_layout.h"
#include "cache/weight_tables.h"
#include "config/config.h"
#include "config/recent.h"
#include "ops/op_table.h"

namespace sparkv::bench {
namespace {

constexpr uint16_t kHidden = 0xfc00;

void Check(sparkv_status status, const sparkv_error& error) {
  if (status != SPARKV_OK) Fail(1, error.text);
}

sparkv_config MakeConfig(const Case& c) {
  sparkv_config config{};
  config.struct_size = sizeof(config);
  sparkv_error error{};
  Check(sparkv_config_preset(&config, c.side.c_str(), &error), error);
  Check(sparkv_config_set(&config, "simd", c.simd.c_str(), &error), error);
  return config;
}

// Rows that are older than this are packed.
int32_t OldestRecent(const sparkv_config& config) {
  const std::vector<RecentStage> stages = RecentStages(config);
  return stages.empty() ? config.window : stages.back().until;
}

// `spare` cells follow those of the case in each stream.
class Cache {
 public:
  Cache(const Case& c, int spare) : shape_(c.shape) {
    const sparkv_config config = MakeConfig(c);
    const sparkv_layer_shape layer{shape_.kv_heads, shape_.dim, shape_.dim};
    sparkv_shape cells{};
    cells.struct_size = sizeof(cells);
    cells.n_layers = 1;
    cells.layers = &layer;
    cells.cells_per_stream = int64_t{c.tokens} * (c.unified() ? c.sequences : 1) + spare;
    cells.n_streams = c.unified() ? 1 : c.sequences;
    sparkv_error error{};
    Check(sparkv_cache_create(&config, &cells, &cache_, &error), error);
  }
  ~Cache() { sparkv_cache_free(cache_); }
  Cache(const Cache&) = delete;
  void operator=(const Cache&) = delete;

  sparkv_cache* get() const { return cache_; }

  void Write(const int64_t* cells, int64_t n, const void* keys, const void* values,
             sparkv_row_type type) {
    const size_t stride = shape_.row() * (type == SPARKV_ROW_F16 ? 2 : 4);
    sparkv_error error{};
    Check(sparkv_cache_write_keys(cache_, 0, cells, n, keys, type, stride, &error), error);
    Check(sparkv_cache_write_values(cache_, 0, cells, n, values, type, stride, &error), error);
  }

  void Attend(sparkv_attend_args& args) {
    args.struct_size = sizeof(args);
    args.n_heads = shape_.n_heads();
    args.scale = 1.0f / std::sqrt(float(shape_.dim));
    args.q_head_stride = size_t(shape_.dim) * sizeof(float);
    args.q_token_stride = args.q_head_stride * size_t(args.n_heads);
    sparkv_error error{};
    Check(sparkv_cache_attend(cache_, &args, &error), error);
  }

 private:
  Shape shape_;
  sparkv_cache* cache_ = nullptr;
};

class AttendSide : public Side {
 public:
  explicit AttendSide(const Case& c) : cache_(c, 0) {
    Fill(c);
    sparkv_memory memory{};
    memory.struct_size = sizeof(memory);
    sparkv_cache_memory(cache_.get(), &memory);
    bytes_ =
        double(memory.key_masks + memory.key_signs + memory.key_scales + memory.key_kept +
               memory.value_scales + memory.value_codes + memory.dense_keys + memory.dense_values);
    packed_ = memory.sealed;
    const sparkv_config config = MakeConfig(c);
    const int64_t recent =
        int64_t{c.sequences} * std::min(c.tokens, OldestRecent(config) + config.sinks);
    // Tokens that are packed together are as old as the first of them.
    const int64_t more = int64_t{c.sequences} * (kTogether - 1);
    const int64_t left = memory.tokens - memory.sealed;
    if (left > recent || left < recent - more)
      Fail(1, c.side + ": " + std::to_string(memory.sealed) + " of " +
                  std::to_string(memory.tokens) + " rows are packed, all but " +
                  std::to_string(recent) + " should be");
  }

  void Prepare(const Case& c) override {
    // As in a program of llama.cpp: on the threads that ggml computes with.
    sparkv_cache_set_team(cache_.get(),
                          reinterpret_cast<sparkv_team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
    sparkv_cache_set_threads(cache_.get(), c.threads);
    const int rows = c.queries * c.sequences;
    q_ = Queries(c.shape, rows);
    out_.resize(q_.size());
    args_ = {};
    args_.n_streams = c.unified() ? 1 : c.sequences;
    args_.n_tokens = rows / args_.n_streams;
    args_.n_kv = int64_t{c.tokens} * c.sequences / args_.n_streams;
    args_.q = q_.data();
    args_.q_stream_stride = q_.size() / size_t(args_.n_streams) * sizeof(float);
    args_.out = out_.data();
    mask_.clear();
    if (!c.unified()) return;
    mask_.assign(size_t(rows) * size_t(args_.n_kv), kHidden);
    for (int row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < c.tokens; ++i)
        mask_[size_t(row * args_.n_kv + c.CellOf(row / c.queries, i))] = 0;
    }
    args_.mask = mask_.data();
    args_.mask_token_stride = size_t(args_.n_kv) * sizeof(uint16_t);
  }
  void Step() override { cache_.Attend(args_); }
  double bytes() const override { return bytes_; }
  int64_t packed() const override { return packed_; }

 private:
  // Sequence after sequence or, interleaved, all together, token by token: where recent rows lie
  // depends on who came when. Most queries see few tokens, so that filling takes time linear in the
  // tokens. The last one of a micro-batch also sees the oldest row that is not packed: a row is
  // packed by a query that sees it.
  void Fill(const Case& c) {
    constexpr int64_t kBatch = 128, kNear = 2 * kBatch;
    const int64_t far = OldestRecent(MakeConfig(c)) + kNear, row = int64_t(c.shape.row());
    const std::vector<uint16_t> keys = Rows(c.shape, c.tokens, true),
                                values = Rows(c.shape, c.tokens, false);
    const int together = c.streams == "interleaved" ? c.sequences : 1;
    const int64_t batch = std::max<int64_t>(1, kBatch / together);  // tokens of each
    std::vector<float> q = Queries(c.shape, int(batch * together)), out(q.size());
    std::vector<uint16_t> mask, batch_keys, batch_values;
    std::vector<int64_t> cells;
    int64_t n_kv = 0;
    for (int s = 0; s < c.sequences; s += together) {
      // Of its stream, which follows those of the sequences before. What lies behind n_kv is gone.
      const int64_t base = c.unified() ? 0 : int64_t{s} * c.tokens;
      if (!c.unified()) n_kv = 0;
      for (int64_t first = 0; first < c.tokens; first += batch) {
        const int64_t end = std::min<int64_t>(c.tokens, first + batch),
                      n = (end - first) * together;
        n_kv = std::max(n_kv, c.CellOf(s + together - 1, end - 1) + 1);
        cells.clear();
        batch_keys.clear();
        batch_values.clear();
        mask.assign(size_t(n * n_kv), kHidden);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t t = first + i / together;
          const int of = s + int(i % together);
          cells.push_back(base + c.CellOf(of, t));
          batch_keys.insert(batch_keys.end(), &keys[size_t(t * row)], &keys[size_t(t * row)] + row);
          batch_values.insert(batch_values.end(), &values[size_t(t * row)],
                              &values[size_t(t * row)] + row);
          const int64_t sees = t + 1 == end ? far : kNear;
          for (int64_t seen = std::max<int64_t>(0, t + 1 - sees); seen <= t; ++seen)
            mask[size_t(i * n_kv + c.CellOf(of, seen))] = 0;
        }
        cache_.Write(cells.data(), n, batch_keys.data(), batch_values.data(), SPARKV_ROW_F16);
        sparkv_attend_args args{};
        args.first_stream = c.unified() ? 0 : s;
        args.n_streams = 1;
        args.n_kv = n_kv;
        args.n_tokens = n;
        args.q = q.data();
        args.mask = mask.data();
        args.mask_token_stride = size_t(n_kv) * sizeof(uint16_t);
        args.out = out.data();
        cache_.Attend(args);
      }
    }
  }

  Cache cache_;
  sparkv_attend_args args_{};
  std::vector<float> q_, out_;
  std::vector<uint16_t> mask_;
  double bytes_ = 0.0;
  int64_t packed_ = 0;
};

// What becomes of the rows of a micro-batch until they are packed: coded by each stage on their way
// and read back for the next one, in chunks like the cache.
class SealSide : public Side {
 public:
  explicit SealSide(const Case& c)
      : shape_(c.shape),
        n_(c.queries),
        keys_(Rows(c.shape, n_, true)),
        values_(Rows(c.shape, n_, false)) {
    const sparkv_config config = MakeConfig(c);
    ops_ = CpuOps(sparkv_simd(config.simd));
    KeyLayout key = KeyLayout::Make(shape_.dim, KeptChannels(config.ratio, shape_.dim),
                                    sparkv_number(config.kept), sparkv_recover(config.recover));
    const ValueLayout value = ValueLayout::Make(shape_.dim, sparkv_number(config.values));
    for (const RecentStage& stage : RecentStages(config))
      forms_.push_back({StageKey(stage, key), StageValue(stage, value), {}});
    forms_.push_back({key, value, {}});
    // Queries use all channels alike (Queries).
    const std::vector<float> u(size_t(shape_.dim), 1.0f);
    std::vector<uint16_t> restore(u.size());
    table_.resize(size_t(kWeightParts * shape_.dim + 16));
    if (key.tiered()) {
      std::vector<float> energy(u.size());
      for (size_t i = 0; i < keys_.size(); ++i) {
        const float k = HalfToFloat(keys_[i]);
        energy[i % energy.size()] += k * k;
      }
      MakeTierTable(u.data(), energy.data(), shape_.dim, restore.data());
    } else {
      MakeTable(key.recover, u.data(), shape_.dim, restore.data());
    }
    ExpandTable(restore.data(), shape_.dim, table_.data());
    for (Form& form : forms_) {
      if (form.key.tiered()) form.key = form.key.Under(restore.data());
      form.rows.resize(rows() * form.row_bytes() + 128);
    }
    pool_.Resize(c.threads);
  }
  void Step() override {
    constexpr size_t kChunk = 16;
    pool_.ParallelFor(int64_t((rows() + kChunk - 1) / kChunk), [&](int64_t chunk, int) {
      const size_t first = size_t(chunk) * kChunk, n = std::min(rows() - first, kChunk),
                   dim = size_t(shape_.dim);
      uint16_t key_space[kChunk * kMaxHeadDim], value_space[kChunk * kMaxHeadDim];
      const float* tables[kChunk];
      const uint16_t *keys[kChunk], *values[kChunk];
      uint8_t *to_key[kChunk], *to_value[kChunk];
      for (size_t i = 0; i < n; ++i) {
        keys[i] = &keys_[(first + i) * dim];
        values[i] = &values_[(first + i) * dim];
      }
      for (Form& form : forms_) {
        for (size_t i = 0; i < n; ++i) {
          tables[i] = form.key.needs_table() ? table_.data() : nullptr;
          to_key[i] = form.rows.data() + (first + i) * form.row_bytes();
          to_value[i] = to_key[i] + form.key.bytes;
        }
        ops_->pack_keys(form.key, int(n), tables, keys, to_key);
        ops_->pack_values(form.value, int(n), values, to_value);
        if (&form == &forms_.back()) break;
        for (size_t i = 0; i < n; ++i) {
          ops_->unpack_key(form.key, tables[i], to_key[i], key_space + i * dim);
          ops_->unpack_value(form.value, to_value[i], value_space + i * dim);
          keys[i] = key_space + i * dim;
          values[i] = value_space + i * dim;
        }
      }
    });
  }
  // Rows of stages are written and read.
  double bytes() const override {
    size_t bytes = (keys_.size() + values_.size()) * sizeof(uint16_t);
    for (const Form& form : forms_)
      bytes += rows() * form.row_bytes() * (&form == &forms_.back() ? 1 : 2);
    return double(bytes);
  }

 private:
  struct Form {
    KeyLayout key;
    ValueLayout value;
    std::vector<uint8_t> rows;
    size_t row_bytes() const { return key.bytes + value.bytes; }
  };
  size_t rows() const { return size_t(n_) * size_t(shape_.kv_heads); }  // of one head

  Shape shape_;
  int n_;
  std::vector<uint16_t> keys_, values_;
  const OpTable* ops_;
  std::vector<Form> forms_;  // packed rows last
  std::vector<float> table_;
  ThreadPool pool_;
};

// Writes the same cells again and again: f32 in as a host gives it, f16 in dense slots out.
class AppendSide : public Side {
 public:
  explicit AppendSide(const Case& c)
      : cache_(c, c.queries),
        cells_(size_t(c.queries)),
        keys_(ToFloats(Rows(c.shape, c.queries, true))),
        values_(ToFloats(Rows(c.shape, c.queries, false))) {
    std::iota(cells_.begin(), cells_.end(), 0);
  }
  void Step() override {
    cache_.Write(cells_.data(), int64_t(cells_.size()), keys_.data(), values_.data(),
                 SPARKV_ROW_F32);
  }
  double bytes() const override { return double(keys_.size() + values_.size()) * (4 + 2); }

 private:
  Cache cache_;
  std::vector<int64_t> cells_;
  std::vector<float> keys_, values_;
};

}  // namespace

std::unique_ptr<Side> SparkvAttend(const Case& c) { return std::make_unique<AttendSide>(c); }
std::unique_ptr<Side> SparkvSeal(const Case& c) { return std::make_unique<SealSide>(c); }
std::unique_ptr<Side> SparkvAppend(const Case& c) { return std::make_unique<AppendSide>(c); }

}  // namespace sparkv::bench

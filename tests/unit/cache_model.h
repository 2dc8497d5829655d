// A host for tests: it places tokens of sequences in cells as llama.cpp does (one stream that a
// mask separates, or a stream per sequence), makes masks, and knows what attention over the raw
// rows would give.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/half.h"
#include "ops/op_table.h"
#include "reference/reference.h"
#include "sparkv/sparkv.h"

namespace sparkv::test {

// How far two answers of a cache may be apart: f32 sums in another order, and what AUTO gives,
// whose numbers are two bf16 on AMX.
constexpr double kF32Sums = 2e-5;
inline const double kSums = CpuOps(SPARKV_SIMD_AUTO) == CpuOps(SPARKV_SIMD_AMX) ? 1e-4 : kF32Sums;

constexpr uint16_t kHidden = 0xfc00u;

struct Layer {
  int n_kv_heads, k_dim, v_dim, group;
  int n_heads() const { return n_kv_heads * group; }
  size_t k_row() const { return size_t(n_kv_heads * k_dim); }
  size_t v_row() const { return size_t(n_kv_heads * v_dim); }
  size_t q_row() const { return size_t(n_heads() * k_dim); }
  size_t out_row() const { return size_t(n_heads() * v_dim); }
  float scale() const { return 1.0f / std::sqrt(float(k_dim)); }
};

struct Model {
  const char* preset = "exact";
  std::vector<std::pair<const char*, const char*>> set;
  std::vector<Layer> layers = {{2, 32, 40, 3}, {1, 64, 32, 2}};
  int64_t cells = 256;
  int streams = 1;
  bool split = false;    // sequence s lives in stream s
  bool scatter = false;  // cells are taken at random, else the lowest free one
};

inline sparkv_config MakeConfig(const Model& model) {
  sparkv_config config{};
  config.struct_size = sizeof(config);
  sparkv_error error{};
  EXPECT_EQ(sparkv_config_preset(&config, model.preset, &error), SPARKV_OK) << error.text;
#if defined(__SANITIZE_ADDRESS__)
  config.simd = SPARKV_SIMD_PLAIN;  // it does not see vector loads under a mask
#endif
  for (const auto& [key, value] : model.set)
    EXPECT_EQ(sparkv_config_set(&config, key, value, &error), SPARKV_OK) << error.text;
  return config;
}

// What a token's rows hold follows from its content, a number, alone. Keys have channels that lie
// far from zero, as real ones.
inline uint64_t Content(int text, int position) {
  return uint64_t(text) * 1000003u + uint64_t(position);
}

inline uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline float Noise(uint64_t seed) {  // about normal, deviation 1
  const uint64_t x = Mix(seed);
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) sum += float(x >> (16 * i) & 0xffff) / 65536.0f - 0.5f;
  return sum * 1.732f;
}

enum Kind { kKeys = 1, kValues = 2, kQueries = 3 };

// f32 numbers that f16 holds exactly (queries aside).
inline std::vector<float> Numbers(uint64_t content, Kind kind, int layer, size_t n) {
  std::vector<float> row(n);
  for (size_t j = 0; j < n; ++j) {
    const uint64_t at = uint64_t(layer) * 4096 + j;
    float x = Noise(Mix(content * 4 + kind) + at * 977);
    const float habit = Noise(Mix(at) + uint64_t(kind) * 31);
    if (kind == kKeys) x = x * std::exp(0.5f * habit) + (j % 13 == 2 ? 4.0f * habit : 0.2f * habit);
    if (kind == kQueries) x *= std::exp(0.8f * habit);
    row[j] = kind == kQueries ? x : HalfToFloat(FloatToHalf(x));
  }
  return row;
}

inline std::vector<uint16_t> Halves(const std::vector<float>& row) {
  std::vector<uint16_t> halves(row.size());
  for (size_t j = 0; j < row.size(); ++j) halves[j] = FloatToHalf(row[j]);
  return halves;
}

struct Placed {
  int64_t cell;
  uint64_t content;
};

using Batch =
    std::vector<std::pair<int, uint64_t>>;  // (sequence, content) in the order of the micro-batch
using Answer = std::vector<float>;          // outputs of one token, layer after layer

// A micro-batch as the cache sees it.
struct Step {
  std::vector<int64_t> cells;
  std::vector<uint64_t> contents;
  std::vector<std::vector<uint64_t>> sees;  // contents per token, its own last
  std::vector<uint16_t> mask;
  int64_t n_kv = 0, n_tokens = 0;  // tokens per stream
  int first_stream = 0, n_streams = 1;
};

// What a call for one stream of a step covers.
inline Step OneStream(const Step& step, int stream) {
  const long n = long(step.n_tokens), begin = stream * n;
  Step one = step;
  one.first_stream = step.first_stream + stream;
  one.n_streams = 1;
  one.contents.assign(step.contents.begin() + begin, step.contents.begin() + begin + n);
  one.mask.assign(step.mask.begin() + begin * step.n_kv,
                  step.mask.begin() + (begin + n) * step.n_kv);
  return one;
}

class Host {
 public:
  explicit Host(const Model& m, uint32_t seed = 1) : model(m), config(MakeConfig(m)), rng_(seed) {
    std::vector<sparkv_layer_shape> shapes;
    for (const Layer& layer : model.layers)
      shapes.push_back({layer.n_kv_heads, layer.k_dim, layer.v_dim});
    const sparkv_shape shape{sizeof(shape),
                             int32_t(shapes.size()),
                             shapes.data(),
                             model.cells,
                             model.streams,
                             nullptr,
                             0};
    EXPECT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_OK) << error.text;
    users_.assign(size_t(model.cells * model.streams), 0);
  }
  ~Host() { sparkv_cache_free(cache); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  int n_layers() const { return int(model.layers.size()); }
  const Layer& layer(int l) const { return model.layers[size_t(l)]; }
  const std::vector<Placed>& sequence(int s) { return sequences_[s]; }

  Step Begin(const Batch& batch) {
    Step step;
    if (model.split) {
      step.first_stream = batch.front().first;
      step.n_streams = batch.back().first - step.first_stream + 1;
    }
    step.n_tokens = int64_t(batch.size()) / step.n_streams;
    std::vector<std::vector<int64_t>> seen;
    for (const auto& [sequence, content] : batch) {
      const int64_t cell = FreeCell(model.split ? sequence : 0);
      ++users_[size_t(cell)];
      sequences_[sequence].push_back({cell, content});
      step.cells.push_back(cell);
      step.contents.push_back(content);
      step.sees.emplace_back();
      seen.emplace_back();
      for (const Placed& token : sequences_[sequence]) {
        step.sees.back().push_back(token.content);
        seen.back().push_back(token.cell % model.cells);
      }
    }
    step.n_kv = UsedEnd();
    step.mask.assign(batch.size() * size_t(step.n_kv), kHidden);
    for (size_t t = 0; t < seen.size(); ++t) {
      for (const int64_t i : seen[t]) step.mask[t * size_t(step.n_kv) + size_t(i)] = 0;
    }
    return step;
  }

  sparkv_status Write(const Step& step, int l, Kind kind) {
    const size_t n = kind == kKeys ? layer(l).k_row() : layer(l).v_row();
    const auto write = kind == kKeys ? sparkv_cache_write_keys : sparkv_cache_write_values;
    const int64_t n_rows = int64_t(step.cells.size());
    // Both row types, and a stride that is wider than the row.
    if (n_rows % 2 == 0) {
      std::vector<uint16_t> rows(step.cells.size() * (n + 6));
      for (size_t t = 0; t < step.cells.size(); ++t) {
        const std::vector<uint16_t> row = Halves(Numbers(step.contents[t], kind, l, n));
        std::copy(row.begin(), row.end(), rows.begin() + long(t * (n + 6)));
      }
      return write(cache, l, step.cells.data(), n_rows, rows.data(), SPARKV_ROW_F16, (n + 6) * 2,
                   &error);
    }
    std::vector<float> rows;
    for (const uint64_t content : step.contents) {
      const std::vector<float> row = Numbers(content, kind, l, n);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return write(cache, l, step.cells.data(), n_rows, rows.data(), SPARKV_ROW_F32, n * 4, &error);
  }

  sparkv_status Attend(const Step& step, int l, std::vector<float>* out) {
    std::vector<float> q;
    for (const uint64_t content : step.contents) {
      const std::vector<float> row = Numbers(content, kQueries, l, layer(l).q_row());
      q.insert(q.end(), row.begin(), row.end());
    }
    out->assign(step.contents.size() * layer(l).out_row(), NAN);
    sparkv_attend_args args = Args(step, l, q.data(), out->data());
    return sparkv_cache_attend(cache, &args, &error);
  }

  sparkv_attend_args Args(const Step& step, int l, const float* q, float* out) const {
    sparkv_attend_args args{};
    args.struct_size = sizeof(args);
    args.layer = l;
    args.first_stream = step.first_stream;
    args.n_streams = step.n_streams;
    args.n_kv = step.n_kv;
    args.n_tokens = step.n_tokens;
    args.n_heads = layer(l).n_heads();
    args.scale = layer(l).scale();
    args.q = q;
    args.q_head_stride = size_t(layer(l).k_dim) * 4;
    args.q_token_stride = layer(l).q_row() * 4;
    args.q_stream_stride = args.q_token_stride * size_t(step.n_tokens);
    args.mask = step.mask.data();
    args.mask_token_stride = size_t(step.n_kv) * 2;
    args.mask_stream_stride = args.mask_token_stride * size_t(step.n_tokens);
    args.out = out;
    return args;
  }

  std::vector<Answer> Run(const Step& step) {
    std::vector<Answer> answers(step.cells.size());
    for (int l = 0; l < n_layers(); ++l) {
      std::vector<float> out;
      EXPECT_EQ(Write(step, l, kKeys), SPARKV_OK) << error.text;
      EXPECT_EQ(Write(step, l, kValues), SPARKV_OK) << error.text;
      EXPECT_EQ(Attend(step, l, &out), SPARKV_OK) << error.text;
      const auto row = long(layer(l).out_row());
      for (size_t t = 0; t < answers.size(); ++t) {
        answers[t].insert(answers[t].end(), out.begin() + long(t) * row,
                          out.begin() + long(t + 1) * row);
      }
    }
    return answers;
  }
  std::vector<Answer> Decode(const Batch& batch) { return Run(Begin(batch)); }

  // Tokens first .. first+n-1 of a text go into a sequence, cut as said; one answer per token.
  std::vector<Answer> Feed(int sequence, int text, int first, int n, const std::vector<int>& cuts) {
    std::vector<Answer> answers;
    for (size_t i = 0; int(answers.size()) < n; ++i) {
      Batch batch;
      const int end = std::min(n, int(answers.size()) + cuts[i % cuts.size()]);
      for (int p = int(answers.size()); p < end; ++p)
        batch.emplace_back(sequence, Content(text, first + p));
      for (Answer& answer : Decode(batch)) answers.push_back(std::move(answer));
    }
    return answers;
  }

  // What attention over raw rows gives the last of the contents.
  Answer Expected(const std::vector<uint64_t>& sees) const {
    Answer answer;
    for (int l = 0; l < n_layers(); ++l) {
      std::vector<float> k, v;
      for (const uint64_t content : sees) {
        const std::vector<float> key = Numbers(content, kKeys, l, layer(l).k_row());
        const std::vector<float> value = Numbers(content, kValues, l, layer(l).v_row());
        k.insert(k.end(), key.begin(), key.end());
        v.insert(v.end(), value.begin(), value.end());
      }
      const std::vector<float> q = Numbers(sees.back(), kQueries, l, layer(l).q_row());
      reference::Attention args;
      args.n_heads = layer(l).n_heads();
      args.n_kv_heads = layer(l).n_kv_heads;
      args.n_kv = int(sees.size());
      args.k_dim = layer(l).k_dim;
      args.v_dim = layer(l).v_dim;
      args.scale = layer(l).scale();
      args.q = q.data();
      args.k = k.data();
      args.v = v.data();
      for (const double x : reference::Attend(args)) answer.push_back(float(x));
    }
    return answer;
  }

  // Keys of all layers, then values of all layers, of the cell.
  std::vector<uint16_t> Rows(int64_t cell) {
    std::vector<uint16_t> all;
    for (const Kind kind : {kKeys, kValues}) {
      for (int l = 0; l < n_layers(); ++l) {
        const std::vector<uint16_t> rows = Read(kind, l, cell, 1);
        all.insert(all.end(), rows.begin(), rows.end());
      }
    }
    return all;
  }
  std::vector<uint16_t> RawRows(uint64_t content) const {
    std::vector<uint16_t> all;
    for (const Kind kind : {kKeys, kValues}) {
      for (int l = 0; l < n_layers(); ++l) {
        const std::vector<uint16_t> rows =
            Halves(Numbers(content, kind, l, kind == kKeys ? layer(l).k_row() : layer(l).v_row()));
        all.insert(all.end(), rows.begin(), rows.end());
      }
    }
    return all;
  }
  std::vector<uint16_t> Read(Kind kind, int l, int64_t first, int64_t n) {
    std::vector<uint16_t> rows(size_t(n) * (kind == kKeys ? layer(l).k_row() : layer(l).v_row()),
                               0xbeef);
    const auto read = kind == kKeys ? sparkv_cache_read_keys : sparkv_cache_read_values;
    EXPECT_EQ(read(cache, l, first, n, rows.data(), &error), SPARKV_OK) << error.text;
    return rows;
  }
  void Restore(Kind kind, int l, int64_t first, const std::vector<uint16_t>& rows) {
    const size_t n = kind == kKeys ? layer(l).k_row() : layer(l).v_row();
    const auto restore = kind == kKeys ? sparkv_cache_restore_keys : sparkv_cache_restore_values;
    EXPECT_EQ(restore(cache, l, first, int64_t(rows.size() / n), rows.data(), &error), SPARKV_OK)
        << error.text;
  }

  sparkv_memory Memory() const {
    sparkv_memory memory{};
    memory.struct_size = sizeof(memory);
    sparkv_cache_memory(cache, &memory);
    return memory;
  }
  std::vector<uint8_t> Weights() const {
    std::vector<uint8_t> bytes(sparkv_cache_save_weights(cache, nullptr, 0));
    EXPECT_EQ(sparkv_cache_save_weights(cache, bytes.data(), bytes.size()), bytes.size());
    return bytes;
  }

  // The host's own view, without telling the cache: sequences forget tokens as llama.cpp's do.
  void Forget(int sequence, size_t from, size_t to) {
    std::vector<Placed>& tokens = sequences_[sequence];
    for (size_t i = from; i < to; ++i) --users_[size_t(tokens[i].cell)];
    tokens.erase(tokens.begin() + long(from), tokens.begin() + long(to));
  }
  void Adopt(int sequence, const Placed& token) {
    ++users_[size_t(token.cell)];
    sequences_[sequence].push_back(token);
  }
  int64_t n_free(int stream) const {
    const auto begin = users_.begin() + stream * model.cells;
    return std::count(begin, begin + model.cells, 0);
  }
  bool in_use(int64_t cell) const { return users_[size_t(cell)] != 0; }
  int64_t UsedEnd() const {
    int64_t end = 1;
    for (int64_t c = 0; c < model.cells * model.streams; ++c) {
      if (users_[size_t(c)] != 0) end = std::max(end, c % model.cells + 1);
    }
    return std::min(model.cells, (end + 31) / 32 * 32);
  }

  const Model model;
  const sparkv_config config;
  sparkv_cache* cache = nullptr;
  sparkv_error error{};

 private:
  int64_t FreeCell(int stream) {
    std::vector<int64_t> free;
    for (int64_t i = 0; i < model.cells; ++i) {
      const int64_t cell = stream * model.cells + i;
      if (users_[size_t(cell)] != 0) continue;
      if (!model.scatter) return cell;
      free.push_back(cell);
    }
    EXPECT_FALSE(free.empty()) << "the test has too few cells";
    return free.empty() ? stream * model.cells : free[rng_() % free.size()];
  }

  std::mt19937 rng_;
  std::vector<int> users_;  // sequences per cell
  std::map<int, std::vector<Placed>> sequences_;
};

// f16 numbers of one weight table: save_weights starts with a header of 32 bytes.
inline size_t TableNumbers(const std::vector<uint8_t>& weights) {
  uint32_t n = 0;
  std::memcpy(&n, weights.data() + 28, 4);
  return n;
}

// Tokens of random sequences, each the next of its own text.
inline Batch Mixed(std::mt19937& rng, std::map<int, int>* next, int n_sequences, int most) {
  Batch batch;
  const int n = 1 + int(rng() % unsigned(most));
  for (int i = 0; i < n; ++i) {
    const int s = int(rng() % unsigned(n_sequences));
    batch.emplace_back(s, Content(s, (*next)[s]++));
  }
  return batch;
}

// Every number within `tolerance` of the largest expected magnitude (at least 1).
template <typename Want>
testing::AssertionResult Near(const std::vector<float>& got, const std::vector<Want>& want,
                              double tolerance) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " numbers instead of " << want.size();
  double largest = 1.0;
  for (const Want x : want)
    largest = std::max(largest, std::isfinite(double(x)) ? std::fabs(double(x)) : 0.0);
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = got[i], b = double(want[i]);
    if (std::isnan(a) && std::isnan(b)) continue;
    if (!(std::fabs(a - b) <= tolerance * largest)) {
      return testing::AssertionFailure() << "number " << i << " is " << a << ", expected " << b
                                         << " (largest " << largest << ")";
    }
  }
  return testing::AssertionSuccess();
}

inline testing::AssertionResult Near(const std::vector<Answer>& got,
                                     const std::vector<Answer>& want, double tolerance) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " answers instead of " << want.size();
  for (size_t t = 0; t < got.size(); ++t) {
    if (auto result = Near(got[t], want[t], tolerance); !result) return result << " in token " << t;
  }
  return testing::AssertionSuccess();
}

}  // namespace sparkv::test

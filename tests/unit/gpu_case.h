// One decode step over paged stores, its buffers on the host and its answer in double precision:
// for the emulator (gpu_test.cc) and for a real GPU (tests/gpu/gpu_test.cc).
#pragma once

#include <algorithm>
#include <numeric>

#include "cache/weight_tables.h"
#include "format/levels.h"
#include "hard_rows.h"
#include "ops/gpu/pages.h"
#include "reference/reference.h"
#include "sparkv/gpu.h"

namespace sparkv::test {

struct GpuShape {
  int head_dim = 64, kv_heads = 1, group = 1;
  float softcap = 0.0f;
  bool holes = false;     // rows missing from pages
  bool infinite = false;  // the last row of each sequence is not finite
  int repeat = 1;  // each row comes so many times, which changes nothing; rows fill their pages
  int empty_page = -1;  // the page of that number of each sequence is gone
  struct Rows {
    sparkv_number keys, values;
    std::vector<int> n_rows;  // of each sequence
  };
  std::vector<Rows> stores;
};

// Cases that the emulator and a GPU are both given; lengths are what each can do.
inline constexpr std::pair<sparkv_number, sparkv_number> kPageFormats[] = {
    {SPARKV_TIERS_7543, SPARKV_TRELLIS4},
    {SPARKV_TIERS_7432, SPARKV_TRELLIS4},
    {SPARKV_TIERS_6321, SPARKV_TRELLIS3},
    {SPARKV_TIERS_5321, SPARKV_TRELLIS2},
    {SPARKV_TIERS_4210, SPARKV_TRELLIS1},
    {SPARKV_INT8, SPARKV_INT8},
    {SPARKV_F16, SPARKV_F16}};
inline constexpr int kGroups[] = {1, 4, 5, 8, 11};
inline GpuShape ShapeOfGroup(int group, const std::vector<int>& n_rows) {
  GpuShape shape;
  shape.group = group;
  shape.kv_heads = 2;
  shape.holes = group % 2 == 1;
  shape.softcap = group == 4 ? 5.0f : 0.0f;
  shape.stores = {{SPARKV_TIERS_6321, SPARKV_TRELLIS3, n_rows}};
  return shape;
}
inline GpuShape ShapeOfAllStores(int recent, int packed) {
  GpuShape shape;
  shape.kv_heads = 2;
  shape.group = 3;
  shape.stores = {{SPARKV_F16, SPARKV_F16, {32, 0, 1, 0}},
                  {SPARKV_INT8, SPARKV_INT8, {64, 0, 0, 5}},
                  {SPARKV_TIERS_7432, SPARKV_TRELLIS4, {recent, 0, 3, 0}},
                  {SPARKV_TIERS_6321, SPARKV_TRELLIS3, {packed, 0, 40, 0}}};
  return shape;
}
inline std::vector<GpuShape> ShapesThatAreNotFinite(int n_rows) {
  std::vector<GpuShape> shapes;
  for (const auto& [keys, values] : {kPageFormats[0], kPageFormats[3], kPageFormats[5]}) {
    GpuShape shape;
    shape.group = 2;
    shape.infinite = true;
    shape.stores = {{keys, values, {n_rows, 0, 1}}};
    shapes.push_back(shape);
  }
  return shapes;
}
inline GpuShape ShapeWithoutAPage() {
  GpuShape shape;
  shape.holes = true;
  shape.empty_page = 4;
  shape.stores = {{SPARKV_TIERS_6321, SPARKV_TRELLIS3, {300}}};
  return shape;
}

class GpuCase {
 public:
  struct Store {
    std::vector<uint8_t> key_pages, value_pages;
    std::vector<uint16_t> weights;
    std::vector<int32_t> pages, n_rows;
    std::vector<uint32_t> rows;
    int32_t max_pages = 0;
  };

  GpuShape shape;
  std::vector<Store> stores;
  std::vector<float> q;
  std::vector<double> want;    // [sequences][heads][D]
  std::vector<double> spread;  // largest |v| that a head sees, what errors are measured by

  GpuCase(const GpuShape& shape, unsigned seed) : shape(shape), rng_(seed) {
    const size_t sequences = shape.stores[0].n_rows.size(), heads = size_t(shape.kv_heads);
    const size_t dim = size_t(shape.head_dim), group = size_t(shape.group);
    std::normal_distribution<float> normal;
    q.resize(sequences * heads * group * dim);
    for (float& x : q) x = 2.0f * normal(rng_);
    keys_.resize(sequences * heads);
    values_.resize(sequences * heads);
    weights_.resize(sequences * heads * dim);
    for (size_t i = 0; i < sequences * heads; ++i) MakeWeights(&weights_[i * dim]);
    for (const GpuShape::Rows& rows : shape.stores) AddStore(rows);
    for (size_t entry = 0; entry < sequences * heads; ++entry) {
      for (size_t g = 0; g < group; ++g) Answer(entry, &q[(entry * group + g) * dim]);
    }
  }

  // Over buffers as they are here; the caller sets the workspace, and device pointers.
  sparkv_gpu_step Step(std::vector<sparkv_gpu_rows>* rows, std::vector<float>* out) const {
    rows->clear();
    for (size_t i = 0; i < stores.size(); ++i) {
      const Store& store = stores[i];
      rows->push_back({sizeof(sparkv_gpu_rows), shape.stores[i].keys, shape.stores[i].values,
                       store.key_pages.data(), store.value_pages.data(),
                       store.weights.empty() ? nullptr : store.weights.data(), store.pages.data(),
                       store.rows.empty() ? nullptr : store.rows.data(), store.n_rows.data(),
                       store.max_pages});
    }
    out->assign(q.size(), -1.0f);
    sparkv_gpu_step step{};
    step.struct_size = sizeof(step);
    step.sequences = int32_t(shape.stores[0].n_rows.size());
    step.kv_heads = shape.kv_heads;
    step.group = shape.group;
    step.head_dim = shape.head_dim;
    step.scale = Scale();
    step.softcap = shape.softcap;
    step.q = q.data();
    step.out = out->data();
    step.stores = rows->data();
    step.n_stores = int32_t(rows->size());
    return step;
  }

  // The largest difference, relative to the values a head sees.
  double Error(const std::vector<float>& out) const {
    double worst = 0.0;
    for (size_t i = 0; i < out.size(); ++i) {
      const double apart = std::fabs(double(out[i]) - want[i]);
      const double by = spread[i / size_t(shape.head_dim)];
      if (std::isnan(want[i]) && std::isnan(out[i])) continue;
      if (!(apart <= 1e30)) return 1e30;
      if (apart > 0.0) worst = std::max(worst, by > 0.0 ? apart / by : 1e30);
    }
    return worst;
  }

 private:
  float Scale() const { return 1.0f / std::sqrt(float(shape.head_dim)); }

  void MakeWeights(uint16_t* weights) {
    const int dim = shape.head_dim;
    std::normal_distribution<float> normal;
    std::vector<float> queries(static_cast<size_t>(dim)), energies(static_cast<size_t>(dim));
    const float spread = float(rng_() % 3);
    for (float& x : queries) x = std::exp(spread * normal(rng_));
    for (float& x : energies) x = std::exp(spread * normal(rng_));
    MakeTierTable(queries.data(), energies.data(), dim, weights);
  }

  std::vector<double> KeyOf(const KeyLayout& layout, const uint16_t* weights,
                            const uint8_t* row) const {
    const size_t dim = size_t(shape.head_dim);
    if (layout.tiered())
      return reference::UnpackTiers(row, weights, shape.head_dim, layout.tier_bits);
    std::vector<double> k(dim);
    for (size_t j = 0; j < dim; ++j) {
      if (layout.number == SPARKV_F16) {
        k[j] = HalfToFloat(uint16_t(row[2 * j] | row[2 * j + 1] << 8));
      } else {
        const int e = (row[0] | row[1] << 8) & 1023;
        const double largest = e == 0 ? 0.0 : e == 1023 ? NAN : std::exp2((e - 1) / 32.0 - 16.0);
        k[j] = largest * LevelOf(SPARKV_INT8, row[2 + j]) / 127.0;
      }
    }
    return k;
  }
  std::vector<double> ValueOf(const ValueLayout& layout, const uint8_t* row) const {
    const size_t dim = size_t(shape.head_dim);
    if (layout.trellis())
      return reference::UnpackTrellisValue(row, shape.head_dim, TrellisBits(layout.number));
    std::vector<double> v(dim);
    for (size_t j = 0; j < dim; ++j) {
      if (layout.number == SPARKV_F16) {
        v[j] = HalfToFloat(uint16_t(row[2 * j] | row[2 * j + 1] << 8));
      } else {
        const int e = row[0] | row[1] << 8;
        const double largest = e == 0 ? 0.0 : e == 4095 ? NAN : std::exp2((e - 1) / 64.0 - 32.0);
        v[j] = largest * (row[2 + j] - 127.5) / 127.5;
      }
    }
    if (layout.number == SPARKV_F16) return v;
    for (size_t half = 1; half < dim; half *= 2) {
      for (size_t i = 0; i < dim; i += 2 * half) {
        for (size_t j = i; j < i + half; ++j) {
          const double a = v[j], b = v[j + half];
          v[j] = a + b;
          v[j + half] = a - b;
        }
      }
    }
    for (double& x : v) x /= std::sqrt(double(dim));
    return v;
  }

  void AddStore(const GpuShape::Rows& rows) {
    const size_t sequences = rows.n_rows.size(), heads = size_t(shape.kv_heads),
                 dim = size_t(shape.head_dim);
    const KeyLayout key_layout =
        KeyLayout::Make(shape.head_dim, shape.head_dim, rows.keys, SPARKV_RECOVER_ZERO);
    const ValueLayout value_layout = ValueLayout::Make(shape.head_dim, rows.values);
    const OpTable* ops = CpuOps(SPARKV_SIMD_AUTO);
    Store store;
    size_t n_pages = 0;
    store.max_pages = 1;
    for (const int n : rows.n_rows) {
      const int pages = (n + kPageRows - 1) / kPageRows;
      store.max_pages = std::max(store.max_pages, int32_t(pages));
      n_pages += size_t(pages);
    }
    store.n_rows.assign(rows.n_rows.begin(), rows.n_rows.end());
    if (key_layout.tiered()) store.weights = weights_;
    const size_t key_bytes = kPageRows * key_layout.bytes,
                 value_bytes = kPageRows * value_layout.bytes;
    store.key_pages.assign(n_pages * heads * key_bytes, 0xee);
    store.value_pages.assign(n_pages * heads * value_bytes, 0xee);
    store.pages.assign(sequences * size_t(store.max_pages), -1);
    if (shape.holes) store.rows.assign(store.pages.size(), 0);
    std::vector<int32_t> order(n_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng_);
    for (size_t s = 0, next = 0; s < sequences; ++s) {
      for (int first = 0; first < rows.n_rows[s]; first += kPageRows, ++next) {
        const size_t slot = s * size_t(store.max_pages) + size_t(first / kPageRows);
        const bool gone = first / kPageRows == shape.empty_page;
        const uint32_t there = gone ? 0 : shape.holes ? uint32_t(rng_()) : ~0u;
        if (shape.holes) store.rows[slot] = there;
        store.pages[slot] = gone ? -1 : order[next];
        for (size_t h = 0; h < heads; ++h) {
          const uint16_t* weights = &weights_[(s * heads + h) * dim];
          const KeyLayout layout = key_layout.Under(weights);
          std::vector<float> table(size_t(kWeightParts) * dim + 16);
          ExpandTable(weights, shape.head_dim, table.data());
          std::vector<uint8_t> key_rows(key_bytes + 128), value_rows(value_bytes + 128);
          for (int r = 0; r < kPageRows; ++r) {
            // Rows that are not there must not matter, whatever they hold.
            const bool counts = first + r < rows.n_rows[s] && (there >> r & 1) != 0;
            const bool broken = !counts || (shape.infinite && first + r == rows.n_rows[s] - 1);
            const int kind = broken ? 8 : int(rng_() % 3) * 2;  // outliers, zeros, the ends of f16
            std::vector<uint16_t> k = HardRow(shape.head_dim, kind == 4 ? 5 : kind, rng_);
            std::vector<uint16_t> v = HardRow(shape.head_dim, kind, rng_);
            uint8_t* key_row = &key_rows[size_t(r) * key_layout.bytes];
            uint8_t* value_row = &value_rows[size_t(r) * value_layout.bytes];
            PackKey(ops, layout, table.data(), k.data(), key_row);
            PackValue(ops, value_layout, v.data(), value_row);
            if (!counts) continue;
            keys_[s * heads + h].push_back(KeyOf(layout, weights, key_row));
            values_[s * heads + h].push_back(ValueOf(value_layout, value_row));
          }
          const size_t page = size_t(order[next]) * heads + h;
          PackKeyPage(layout, key_rows.data(), &store.key_pages[page * key_bytes]);
          PackValuePage(value_layout, value_rows.data(), &store.value_pages[page * value_bytes]);
        }
      }
    }
    if (shape.repeat > 1) Repeat(&store);
    stores.push_back(std::move(store));
  }

  void Repeat(Store* store) const {
    const size_t pages = size_t(store->max_pages);
    std::vector<int32_t> table;
    for (size_t s = 0; s < store->n_rows.size(); ++s) {
      const int of_sequence = store->n_rows[s] / kPageRows;
      for (size_t i = 0; i < pages * size_t(shape.repeat); ++i)
        table.push_back(of_sequence == 0 ? -1 : store->pages[s * pages + i % size_t(of_sequence)]);
      store->n_rows[s] *= shape.repeat;
    }
    store->pages = table;
    store->max_pages *= shape.repeat;
  }

  void Answer(size_t entry, const float* query) {
    const size_t dim = size_t(shape.head_dim);
    std::vector<double> score;
    double most = -INFINITY, total = 0.0, largest = 0.0;
    for (const std::vector<double>& k : keys_[entry]) {
      double s = 0.0;
      for (size_t j = 0; j < dim; ++j) s += k[j] * query[j];
      s *= Scale();
      if (shape.softcap > 0.0f) s = shape.softcap * std::tanh(s / shape.softcap);
      score.push_back(s);
      most = std::max(most, s);
    }
    std::vector<double> o(dim, 0.0);
    for (size_t i = 0; i < score.size(); ++i) {
      const double p = std::exp(score[i] - most);
      total += p;
      for (size_t j = 0; j < dim; ++j) {
        o[j] += p * values_[entry][i][j];
        if (p > 1e-9) largest = std::max(largest, std::fabs(values_[entry][i][j]));
      }
    }
    for (const double x : o) want.push_back(score.empty() ? 0.0 : x / total);
    spread.push_back(largest);
  }

  std::mt19937 rng_;
  std::vector<uint16_t> weights_;
  std::vector<std::vector<std::vector<double>>> keys_, values_;  // [sequence, head][row][D]
};

}  // namespace sparkv::test

// Sealing with a baseline: rows are coded and decoded as a codec of others would, then packed as
// f16 like any row of preset exact. What that codec would have taken is counted, not saved.
#include <algorithm>
#include <vector>

#include "base/half.h"
#include "baselines/baseline.h"
#include "cache/kv_cache.h"
#include "method/think.h"

namespace sparkv {
namespace {

void ToHalves(const std::vector<float>& x, size_t from, size_t n, uint16_t* out) {
  // A decoded number may lie a step beyond the largest f16.
  for (size_t j = 0; j < n; ++j) out[j] = FloatToHalf(std::clamp(x[from + j], -65504.0f, 65504.0f));
}

}  // namespace

// ThinK's channels by the queries and keys of the tokens that make the weights, 1 as f16 for those
// that are kept. u: [k_row]
void KvCache::MakeChannels(const LayerLayout& layer, const NewTable& table, const float* u) {
  const size_t dim = size_t(layer.k_dim());
  const std::vector<uint16_t> keys = TableKeys(layer, table);
  const size_t n_keys = keys.size() / layer.k_row();
  std::vector<float> k(n_keys * dim);
  std::vector<uint8_t> mask(dim);
  for (size_t h = 0; h < size_t(layer.n_kv_heads); ++h) {
    for (size_t t = 0; t < n_keys; ++t) {
      for (size_t j = 0; j < dim; ++j)
        k[t * dim + j] = HalfToFloat(keys[t * layer.k_row() + h * dim + j]);
    }
    ThinkMask(u + h * dim, 1, 1, k.data(), int(n_keys), int(dim), baseline_.ratio, mask.data());
    uint16_t* channels = tables_.at(table.id)->a.data() + layer.table_at + h * dim;
    for (size_t j = 0; j < dim; ++j) channels[j] = mask[j] != 0 ? 0x3c00u : 0;
  }
}

void KvCache::SealBaseline(const LayerLayout& layer) {
  std::vector<Column> columns = step_.aging;  // there are no stages to enter
  std::vector<size_t> begins;                 // of columns whose keys are coded together
  if (key_block_ > 1) {
    std::stable_sort(columns.begin(), columns.end(),
                     [](const Column& x, const Column& y) { return x.block < y.block; });
  }
  for (size_t i = 0; i < columns.size(); ++i) {
    if (i == 0 || key_block_ == 1 || columns[i].block != columns[i - 1].block) begins.push_back(i);
  }
  begins.push_back(columns.size());
  const size_t k_dim = size_t(layer.k_dim()), v_dim = size_t(layer.v_dim());
  pool_.ParallelFor(int64_t(begins.size()) - 1, [&](int64_t run, int) {
    const size_t first = begins[size_t(run)], n = begins[size_t(run) + 1] - first;
    std::vector<uint16_t> keys(n * layer.k_row()), values(layer.v_row());
    std::vector<float> k(n * k_dim), v(v_dim);
    for (size_t h = 0; h < size_t(layer.n_kv_heads); ++h) {
      for (size_t i = 0; i < n; ++i) {
        const uint16_t* key = WindowNumbers(layer, columns[first + i], true) + h * k_dim;
        for (size_t j = 0; j < k_dim; ++j) k[i * k_dim + j] = HalfToFloat(key[j]);
      }
      const uint16_t* channels =
          layer.has_table ? tables_.at(columns[first].table)->a.data() + layer.table_at + h * k_dim
                          : nullptr;
      CodeKeys(baseline_, channels, int(n), int(k_dim), k.data());
      for (size_t i = 0; i < n; ++i)
        ToHalves(k, i * k_dim, k_dim, keys.data() + i * layer.k_row() + h * k_dim);
    }
    for (size_t i = 0; i < n; ++i) {
      const Column& column = columns[first + i];
      const uint16_t* value = WindowNumbers(layer, column, false);
      for (size_t h = 0; h < size_t(layer.n_kv_heads); ++h) {
        for (size_t j = 0; j < v_dim; ++j) v[j] = HalfToFloat(value[h * v_dim + j]);
        CodeValue(baseline_, int(v_dim), v.data());
        ToHalves(v, 0, v_dim, values.data() + h * v_dim);
      }
      PackRow(layer, column.cell, column.table, keys.data() + i * layer.k_row(), values.data());
    }
  });
}

// Bits per element as the codec would store the live tokens.
void KvCache::CountBaseline(sparkv_memory* m) const {
  const double sealed = double(n_sealed_), dense = double(n_dense_);
  const double sets = double(tables_.Live().size());
  double keys = 0.0, values = 0.0, k_row = 0.0, v_row = 0.0;
  for (const LayerLayout& layer : layout_.layers) {
    const double k = double(layer.k_row()), v = double(layer.v_row());
    keys += k * (sealed * KeyBits(baseline_, layer.k_dim()) + dense * 16.0);
    keys += layer.has_table ? k * sets : 0.0;
    values += v * (sealed * ValueBits(baseline_, layer.v_dim()) + dense * 16.0);
    k_row += k;
    v_row += v;
  }
  const double tokens = sealed + dense;
  m->key_bits = keys / (tokens * k_row);
  m->value_bits = values / (tokens * v_row);
  m->bits = (keys + values) / (tokens * (k_row + v_row));
}

}  // namespace sparkv

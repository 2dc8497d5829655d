// Eviction: when the prompt of a sequence has ended, every KV head of every layer chooses which
// packed rows it keeps. Those move to rows of their own (kept_rows.h), the others are gone, and the
// cells give back what they took in the packed store. Evict first, then prune [paper]: rows are
// packed already, so what stays is copied and never packed anew.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "base/half.h"
#include "cache/kv_cache.h"
#include "cache/visible.h"
#include "method/evict.h"

namespace sparkv {
namespace {

// Rows packed in all heads before an eviction pays. It also bounds what a long answer adds.
constexpr int64_t kEvictEvery = 128;
constexpr int kPoolWidth = 5;  // SnapKV's code

// The key row of a head that keeps nothing of a cell, in a state file: -0 in all channels, which
// attention over a dense cache takes for a row of zeros.
constexpr uint16_t kNoRow = 0x8000u;

}  // namespace

// A token that is alone in its micro-batch ends a prompt: its sequence evicts when it has more than
// it may keep. One sequence of a stream at a time; cells that sequences share are evicted for all.
void KvCache::PlanEviction(const sparkv_attend_args& args, int stream_index, const Words& seen,
                           const std::vector<TokenPlan>& tokens) {
  if (config_.evict == SPARKV_EVICT_NONE) return;
  const int stream = args.first_stream + stream_index;
  const int64_t base = stream * layout_.cells_per_stream;
  const size_t words = view_.packed.words;
  const uint64_t* sealed = &sealed_bits_[WordOf(base)];
  const uint64_t* evicted = &evicted_bits_[WordOf(base)];
  for (int64_t t = 0; t < args.n_tokens; ++t) {
    const TokenPlan& plan = tokens[size_t(t)];
    const int64_t own = FlightOf(args, stream_index, t);
    if (own < 0 || !plan.alone || (needs_weights_ && plan.table == 0)) continue;
    const uint64_t* row = &seen[size_t(stream_index * args.n_tokens + t) * words];
    const auto sees = [&](int64_t cell) {
      const int64_t i = cell - base;
      return i >= 0 && i < args.n_kv && HasBit(row, i);
    };
    int64_t n_sealed = 0, n_packed = 0;
    for (size_t w = 0; w < words; ++w) {
      n_sealed += std::popcount(row[w] & sealed[w]);
      n_packed += std::popcount(row[w] & (sealed[w] | evicted[w]));
    }
    if (n_sealed < kEvictEvery) continue;
    Eviction e;
    e.stream = stream;
    for (const Column& column : view_.columns[size_t(stream_index)]) {
      if (!column.sealing && sees(column.cell)) e.dense.push_back(column);
    }
    if (n_packed + int64_t(e.dense.size()) <= config_.evict_tokens) continue;
    e.bits.resize(size_t(layout_.words_per_stream()), 0);
    for (size_t w = 0; w < words; ++w) e.bits[w] = row[w] & (sealed[w] | evicted[w]);
    ForEachBit(e.bits.data(), words, [&](int64_t i) { e.cells.push_back(base + i); });
    for (const auto& [cell, rows] : queries_) {
      if (sees(cell) && plan.rank - cells_.rank(cell) < config_.observe)
        e.queries.emplace_back(cells_.rank(cell), cell);
    }
    if (ScoresByQueries(config_.evict) && e.queries.empty()) continue;
    std::stable_sort(e.cells.begin(), e.cells.end(),
                     [&](int64_t a, int64_t b) { return cells_.rank(a) < cells_.rank(b); });
    std::sort(e.queries.begin(), e.queries.end());
    if (config_.evict == SPARKV_EVICT_TOVA) e.queries.erase(e.queries.begin(), e.queries.end() - 1);
    const int64_t keep = std::max<int64_t>(0, config_.evict_tokens - int64_t(e.dense.size()));
    e.keep = LayerRows(config_.evict, keep, int64_t(e.cells.size()), int(layout_.layers.size()));
    e.rows.resize(layout_.layers.size());
    step_.evictions.push_back(std::move(e));
    return;
  }
}

// Which queries of this micro-batch a later eviction may ask for: the newest of each sequence.
void KvCache::PlanQueries(const sparkv_attend_args& args, int stream_index, const Words& seen,
                          const std::vector<TokenPlan>& tokens) {
  if (!ScoresByQueries(config_.evict)) return;
  const int64_t base = (args.first_stream + stream_index) * layout_.cells_per_stream;
  const auto outdates = [&](int64_t t, int64_t cell, int32_t rank) {
    const int64_t i = cell - base;
    const uint64_t* row = &seen[size_t(stream_index * args.n_tokens + t) * view_.packed.words];
    return tokens[size_t(t)].rank - rank >= config_.observe && i >= 0 && i < args.n_kv &&
           HasBit(row, i);
  };
  for (int64_t t = 0; t < args.n_tokens; ++t) {
    const int64_t own = FlightOf(args, stream_index, t);
    bool newest = own >= 0;
    for (int64_t later = t + 1; later < args.n_tokens && newest; ++later)
      newest = !outdates(later, own, tokens[size_t(t)].rank);
    if (newest) step_.newest.push_back(own);
  }
  std::erase_if(queries_, [&](const auto& entry) {
    for (int64_t t = 0; t < args.n_tokens; ++t) {
      if (outdates(t, entry.first, cells_.rank(entry.first))) return true;
    }
    return false;
  });
  for (const int64_t cell : step_.newest) queries_[cell].resize(layout_.layers.size());
}

void KvCache::KeepQueries(const sparkv_attend_args& args) {
  const size_t dim = size_t(layout_.layers[size_t(args.layer)].k_dim());
  for (const int64_t cell : step_.newest) {
    const auto kept = queries_.find(cell);
    if (kept == queries_.end()) continue;
    std::vector<uint16_t>& row = kept->second[size_t(args.layer)];
    row.resize(size_t(args.n_heads) * dim);
    const uint8_t* q = FlightQuery(args, cell);
    for (int h = 0; h < args.n_heads; ++h) {
      const float* head = reinterpret_cast<const float*>(q + size_t(h) * args.q_head_stride);
      for (size_t j = 0; j < dim; ++j) row[size_t(h) * dim + j] = FloatToHalf(head[j]);
    }
  }
}

// What each of a head's rows is worth, in the order of cells. ExpandTables(layer) was called.
std::vector<float> KvCache::EvictionScores(const sparkv_attend_args& args, const Eviction& e,
                                           int head, const std::vector<int64_t>& cells) const {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  const size_t dim = size_t(layer.k_dim()), n = cells.size();
  std::vector<float> score(n, 0.0f);
  if (config_.evict == SPARKV_EVICT_STREAMINGLLM) {
    for (size_t i = 0; i < n; ++i) score[i] = float(i);
    return score;
  }
  std::vector<uint16_t> half(dim);
  std::vector<float> key(dim);
  const auto each_key = [&](auto&& body) {
    for (size_t i = 0; i < n; ++i) {
      UnpackKey(layer, head, cells[i], cells_.table(cells[i]), half.data());
      for (size_t j = 0; j < dim; ++j) key[j] = HalfToFloat(half[j]);
      body(i);
    }
  };
  const auto norm = [&] {
    float sum = 0.0f;
    for (const float k : key) sum += k * k;
    return std::sqrt(sum);
  };
  if (config_.evict == SPARKV_EVICT_KNORM) {
    each_key([&](size_t i) { score[i] = -norm(); });
    return score;
  }
  if (config_.evict == SPARKV_EVICT_KEYDIFF) {
    std::vector<float> anchor(dim, 0.0f);
    each_key([&](size_t) {
      const float length = norm();
      for (size_t j = 0; j < dim && length > 0.0f; ++j) anchor[j] += key[j] / length;
    });
    each_key([&](size_t i) {
      const float length = norm();
      float along = 0.0f;
      for (size_t j = 0; j < dim; ++j) along += key[j] * anchor[j];
      score[i] = length > 0.0f ? -along / length : 0.0f;
    });
    return score;
  }

  // Logits of the observing queries over the head's rows and, for the sum, over its dense rows.
  const int group = args.n_heads / layer.n_kv_heads;
  const size_t n_queries = e.queries.size() * size_t(group), n_logits = n + e.dense.size();
  std::vector<float> queries(n_queries * dim), logits(n_queries * n_logits);
  for (size_t i = 0; i < e.queries.size(); ++i) {
    const std::vector<uint16_t>& row = queries_.at(e.queries[i].second)[size_t(args.layer)];
    if (row.size() != size_t(args.n_heads) * dim) continue;  // this layer was not attended then
    for (size_t j = 0; j < size_t(group) * dim; ++j) {
      queries[i * size_t(group) * dim + j] =
          HalfToFloat(row[size_t(head) * size_t(group) * dim + j]) * args.scale;
    }
  }
  if (config_.evict == SPARKV_EVICT_EXPECTED) {
    std::vector<QueryMoments> moments;
    for (size_t g = 0; g < size_t(group); ++g) {
      moments.push_back(MomentsOf(&queries[g * dim], e.queries.size(), size_t(group) * dim, dim));
    }
    each_key([&](size_t i) {
      for (size_t g = 0; g < size_t(group); ++g)
        logits[g * n_logits + i] = ExpectedLogit(moments[g], key.data());
    });
    for (size_t g = 0; g < size_t(group); ++g)
      AddAttention(&logits[g * n_logits], int64_t(n), int64_t(n), score.data());
    std::vector<uint16_t> value(size_t(layer.v_dim()));
    for (size_t i = 0; i < n; ++i) {
      ops_->unpack_value(layer.value, PackedRow(layer, head, cells[i], false), value.data());
      float square = 0.0f;
      for (const uint16_t v : value) square += HalfToFloat(v) * HalfToFloat(v);
      score[i] *= std::sqrt(square);
    }
    return score;
  }
  const auto add_logits = [&](size_t column) {
    for (size_t r = 0; r < n_queries; ++r) {
      const float* q = &queries[r * dim];
      float part[8] = {};  // head sizes are multiples of 8
      for (size_t j = 0; j < dim; j += 8) {
        for (size_t lane = 0; lane < 8; ++lane) part[lane] += q[j + lane] * key[j + lane];
      }
      float sum = 0.0f;
      for (const float p : part) sum += p;
      logits[r * n_logits + column] =
          args.softcap > 0.0f ? args.softcap * std::tanh(sum / args.softcap) : sum;
    }
  };
  each_key(add_logits);
  std::vector<uint16_t> row(layer.k_row());
  for (size_t c = 0; c < e.dense.size(); ++c) {
    ReadColumn(layer, e.dense[c], true, row.data());
    for (size_t j = 0; j < dim; ++j) key[j] = HalfToFloat(row[size_t(head) * dim + j]);
    add_logits(n + c);
  }
  for (size_t r = 0; r < n_queries; ++r) {
    float* logit = &logits[r * n_logits];
    for (size_t c = 0; c < e.dense.size(); ++c) {
      if (e.dense[c].rank > e.queries[r / size_t(group)].first)
        logit[n + c] = -std::numeric_limits<float>::infinity();
    }
    AddAttention(logit, int64_t(n_logits), int64_t(n), score.data());
  }
  if (config_.evict == SPARKV_EVICT_TOVA) return score;
  PoolScores(&score, kPoolWidth);
  // The observing tokens' own rows were read by fewer of them: they stay [SnapKV].
  const int32_t observed_from = e.queries.front().first;
  for (size_t i = 0; i < n; ++i) {
    if (cells_.rank(cells[i]) >= observed_from) score[i] = std::numeric_limits<float>::infinity();
  }
  return score;
}

// Chooses the rows of a layer, in all heads, and copies those that stay. What is there stays too
// until the step ends.
void KvCache::EvictLayer(const sparkv_attend_args& args) {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  const size_t n_heads = size_t(layer.n_kv_heads);
  for (Eviction& e : step_.evictions) {
    std::vector<std::vector<int64_t>> cells(n_heads);
    std::vector<std::vector<float>> scores(n_heads);
    pool_.ParallelFor(int64_t(n_heads), [&](int64_t head, int) {
      for (const int64_t cell : e.cells) {
        if (PackedRow(layer, int(head), cell, true) != nullptr) cells[size_t(head)].push_back(cell);
      }
      scores[size_t(head)] = EvictionScores(args, e, int(head), cells[size_t(head)]);
    });
    if (config_.evict == SPARKV_EVICT_TOVA) {
      for (size_t h = 1; h < n_heads; ++h) {
        if (cells[h] != cells[0]) continue;
        for (size_t i = 0; i < scores[0].size(); ++i) scores[0][i] += scores[h][i];
      }
      for (size_t h = 1; h < n_heads; ++h) {
        if (cells[h] == cells[0]) scores[h] = scores[0];
      }
    }
    std::vector<KeptRows>& rows = e.rows[size_t(args.layer)];
    rows.resize(n_heads);
    for (size_t h = 0; h < n_heads; ++h) {
      const std::vector<uint8_t> kept = SelectRows(scores[h], e.keep[size_t(args.layer)]);
      std::vector<int64_t> chosen;
      for (size_t i = 0; i < kept.size(); ++i) {
        if (kept[i] != 0) chosen.push_back(cells[h][i]);
      }
      rows[h] = CollectRows(layer, int(h), e, chosen);
    }
  }
}

// Rows of `chosen` and of what other sequences of the stream keep, in order of cells.
KeptRows KvCache::CollectRows(const LayerLayout& layer, int head, const Eviction& e,
                              const std::vector<int64_t>& chosen) const {
  const int64_t base = e.stream * layout_.cells_per_stream;
  Words bits(e.bits.size(), 0);
  const KeptRows& old = Kept(e.stream, layer, head);
  const uint64_t* evicted = &evicted_bits_[WordOf(base)];
  for (size_t w = 0; w < old.cells.size(); ++w) bits[w] = old.cells[w] & evicted[w] & ~e.bits[w];
  for (const int64_t cell : chosen)
    bits[size_t((cell - base) / 64)] |= uint64_t{1} << ((cell - base) % 64);
  while (!bits.empty() && bits.back() == 0) bits.pop_back();
  bits.shrink_to_fit();
  int64_t n = 0;
  for (const uint64_t word : bits) n += std::popcount(word);
  KeptRows rows;
  rows.Resize(layer, n);
  int64_t at = 0;
  ForEachBit(bits.data(), bits.size(), [&](int64_t i) {
    std::memcpy(rows.key(layer, at), PackedRow(layer, head, base + i, true), layer.key.bytes);
    std::memcpy(rows.value(layer, at), PackedRow(layer, head, base + i, false), layer.value.bytes);
    ++at;
  });
  rows.cells = std::move(bits);
  return rows;
}

// The rows that were chosen become what the heads keep, if every layer has chosen.
void KvCache::CommitEviction(Eviction* e) {
  if (std::any_of(e->rows.begin(), e->rows.end(), [](const auto& rows) { return rows.empty(); }))
    return;
  for (size_t l = 0; l < e->rows.size(); ++l) {
    for (size_t h = 0; h < e->rows[l].size(); ++h)
      Kept(e->stream, layout_.layers[l], int(h)) = std::move(e->rows[l][h]);
  }
  for (const int64_t cell : e->cells) {
    if (cells_.state(cell) != CellState::kSealed) continue;
    RemovePacked(cell);
    --n_sealed_;
    cells_.set_state(cell, CellState::kEvicted);
    EvictedWord(cell) |= uint64_t{1} << (layout_.index_of(cell) % 64);
    ++n_evicted_;
  }
  CountKept();
}

void KvCache::ForgetEvicted(int64_t cell) {
  EvictedWord(cell) &= ~(uint64_t{1} << (layout_.index_of(cell) % 64));
  // Rows of cells that are gone lie idle until the next eviction of their stream, or the last cell.
  if (--n_evicted_ == 0) ForgetKept();
}

// Restored cells whose heads kept only some rows: their packed rows say which (kNoRow).
void KvCache::EvictRestored() {
  std::vector<int64_t> dense;
  for (const int64_t cell : restore_.evicted) {
    if (cells_.state(cell) == CellState::kDense && (!needs_weights_ || cells_.table(cell) != 0)) {
      AddPacked(cell);
      dense.push_back(cell);
    }
  }
  for (size_t l = 0; l < layout_.layers.size() && !dense.empty(); ++l) {
    const LayerLayout& layer = layout_.layers[l];
    ExpandTables(int(l));
    std::vector<uint16_t> key(layer.k_row()), value(layer.v_row());
    for (const int64_t cell : dense) {
      ReadCell(true, layer, cell, key.data());
      ReadCell(false, layer, cell, value.data());
      PackRow(layer, cell, cells_.table(cell), key.data(), value.data());
    }
  }
  for (const int64_t cell : dense) SealRestored(cell);
  std::map<int, Eviction> by_stream;
  for (const int64_t cell : restore_.evicted) {
    if (cells_.state(cell) != CellState::kSealed) continue;
    Eviction& e = by_stream[int(layout_.stream_of(cell))];
    e.bits.resize(size_t(layout_.words_per_stream()), 0);
    e.bits[size_t(layout_.index_of(cell) / 64)] |= uint64_t{1} << (layout_.index_of(cell) % 64);
    e.cells.push_back(cell);
  }
  restore_.evicted.clear();
  for (auto& [stream, e] : by_stream) {
    e.stream = stream;
    std::sort(e.cells.begin(), e.cells.end());
    for (size_t l = 0; l < layout_.layers.size(); ++l) {
      const LayerLayout& layer = layout_.layers[l];
      ExpandTables(int(l));
      std::vector<KeptRows> rows;
      std::vector<uint16_t> key(layer.k_row());
      for (int h = 0; h < layer.n_kv_heads; ++h) {
        std::vector<int64_t> chosen;
        for (const int64_t cell : e.cells) {
          UnpackKey(layer, h, cell, cells_.table(cell), key.data());
          if (!IsNoRow(key.data(), layer.k_dim())) chosen.push_back(cell);
        }
        rows.push_back(CollectRows(layer, h, e, chosen));
      }
      e.rows.push_back(std::move(rows));
    }
    CommitEviction(&e);
  }
}

bool KvCache::IsNoRow(const uint16_t* key, int dim) {
  return std::all_of(key, key + dim, [](uint16_t x) { return (x & 0x7fffu) == 0; });
}

void KvCache::WriteNoRow(uint16_t* key, int dim) { std::fill(key, key + dim, kNoRow); }

// How many heads of a key row from outside say that they kept nothing.
int KvCache::EvictedHeads(const LayerLayout& layer, const uint16_t* row) {
  int n = 0;
  for (int h = 0; h < layer.n_kv_heads; ++h, row += layer.k_dim())
    n += std::all_of(row, row + layer.k_dim(), [](uint16_t x) { return x == kNoRow; }) ? 1 : 0;
  return n;
}

uint8_t* KvCache::PackedRow(const LayerLayout& layer, int head, int64_t cell, bool keys) const {
  if (cells_.state(cell) != CellState::kEvicted) {
    return packed_.data() +
           (keys ? layout_.key_at(layer, head, cell) : layout_.value_at(layer, head, cell));
  }
  const KeptRows& kept = Kept(int(layout_.stream_of(cell)), layer, head);
  const int64_t at = kept.Find(layout_.index_of(cell));
  if (at < 0) return nullptr;
  return keys ? kept.key(layer, at) : kept.value(layer, at);
}

void KvCache::ForgetKept() {
  for (KeptRows& rows : kept_) rows = {};
  CountKept();
}

void KvCache::CountKept() {
  kept_bytes_ = kept_bit_bytes_ = 0;
  for (size_t l = 0; l < layout_.layers.size(); ++l) {
    kept_rows_[l] = 0;
    for (int s = 0; s < layout_.n_streams; ++s) {
      for (int h = 0; h < layout_.layers[l].n_kv_heads; ++h) {
        const KeptRows& rows = Kept(s, layout_.layers[l], h);
        kept_rows_[l] += uint64_t(rows.count);
        kept_bytes_ += rows.rows.capacity();
        kept_bit_bytes_ += rows.cells.capacity() * 8;
      }
    }
  }
}

}  // namespace sparkv

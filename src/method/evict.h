// Eviction: which rows a KV head keeps of a prompt. Scores say what a row is worth; the highest
// stay (docs/method.md, section 12).
#pragma once

#include <cstdint>
#include <vector>

#include "sparkv/sparkv.h"

namespace sparkv {

// Methods that read queries: the newest one (TOVA) or the newest `observe` (SnapKV, PyramidKV,
// expected attention).
inline bool ScoresByQueries(int32_t evict) {
  return evict == SPARKV_EVICT_TOVA || evict == SPARKV_EVICT_SNAPKV ||
         evict == SPARKV_EVICT_PYRAMIDKV || evict == SPARKV_EVICT_EXPECTED;
}

// A normal number per channel: what queries are like.
struct QueryMoments {
  std::vector<float> mean, variance;  // [head_dim]
};
// queries: n rows of head_dim, `stride` floats apart.
QueryMoments MomentsOf(const float* queries, size_t n, size_t stride, size_t head_dim);
// Logarithm of the mean of e^(q . k) over such queries: mean . k + variance . k^2 / 2.
float ExpectedLogit(const QueryMoments& q, const float* k);

// What one query adds: score[i] += softmax(logits)[i] for i < n. logits: [n_logits], n_logits >= n,
// overwritten. A logit of -inf is not seen.
void AddAttention(float* logits, int64_t n_logits, int64_t n, float* score);

// SnapKV: the mean of each score and its neighbours, `width` (odd) in all, zeros beyond the ends.
void PoolScores(std::vector<float>* score, int width);

// kept[i] = 1 for the `keep` highest of scores [n]; of equals the later one stays. A score that is
// no number counts as the lowest.
std::vector<uint8_t> SelectRows(const std::vector<float>& score, int64_t keep);

// Rows that each layer keeps of n, `keep` on average. PyramidKV: they fall linearly from
// 2 keep - keep / 20 in the first layer to keep / 20 in the last; what a layer has not, the others
// share. All other methods: keep.
std::vector<int64_t> LayerRows(int32_t evict, int64_t keep, int64_t n, int n_layers);

}  // namespace sparkv

#include "cache/weight_tables.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/half.h"

namespace sparkv {

uint16_t WeightTables::Make() {
  size_t id = 1;
  while (id < tables_.size() && tables_[id] != nullptr) ++id;
  if (id >= 65535) return 0;  // the last number means "several"
  if (id == tables_.size()) tables_.emplace_back();
  tables_[id] = std::make_unique<WeightTable>();
  tables_[id]->a.assign(numbers_, 0);
  tables_[id]->refs = 1;
  ++n_tables_;
  Used(uint16_t(id));
  return uint16_t(id);
}

void WeightTables::Unref(uint16_t id) {
  if (id == 0) return;
  if (--tables_[id]->refs == 0) DropIdle();
}

void WeightTables::Clear(uint16_t held) {
  for (auto& table : tables_) {
    if (table != nullptr) table->refs = 0;
  }
  Ref(held);
  DropIdle();
}

void WeightTables::DropIdle() {
  for (;;) {
    size_t idle = 0, oldest = 0;
    for (size_t id = 1; id < tables_.size(); ++id) {
      if (tables_[id] == nullptr || tables_[id]->refs != 0) continue;
      ++idle;
      if (oldest == 0 || tables_[id]->last_use < tables_[oldest]->last_use) oldest = id;
    }
    if (idle * numbers_ * sizeof(uint16_t) <= kIdleBytes) return;
    tables_[oldest].reset();
    --n_tables_;
  }
}

bool WeightTables::Has(const void* numbers) const {
  return std::any_of(tables_.begin(), tables_.end(), [&](const auto& table) {
    return table != nullptr &&
           std::memcmp(table->a.data(), numbers, numbers_ * sizeof(uint16_t)) == 0;
  });
}

std::vector<uint16_t> WeightTables::Numbers(int64_t least_refs) const {
  std::vector<uint16_t> ids;
  for (size_t id = 1; id < tables_.size(); ++id) {
    if (tables_[id] != nullptr && tables_[id]->refs >= least_refs) ids.push_back(uint16_t(id));
  }
  std::sort(ids.begin(), ids.end(),
            [this](uint16_t x, uint16_t y) { return tables_[x]->last_use > tables_[y]->last_use; });
  return ids;
}

namespace {

uint16_t Weight(double x) { return FloatToHalf(float(std::fmin(std::fmax(x, 0x1p-14), 65504.0))); }

}  // namespace

void MakeTable(sparkv_recover recover, const float* u, int head_dim, uint16_t* restore) {
  float largest = 0.0f;
  for (int j = 0; j < head_dim; ++j)
    largest = std::fmax(largest, std::isfinite(u[j]) ? u[j] : 0.0f);
  // weight: the reference ranks by k^2 u, so |k| sqrt(u); the paper by |k| u. Scaled to a root mean
  // square of 1.
  const auto alive = [&](int j) { return u[j] > 1e-12f * largest && std::isfinite(u[j]); };
  const auto weight = [&](int j) {
    return recover == SPARKV_RECOVER_PAPER ? double(u[j]) : std::sqrt(double(u[j]));
  };
  double energy = 0.0;
  int n_alive = 0;
  for (int j = 0; j < head_dim; ++j) {
    if (!alive(j)) continue;
    energy += weight(j) * weight(j);
    ++n_alive;
  }
  const double rms = n_alive > 0 ? std::sqrt(energy / n_alive) : 1.0;
  // No query energy at all: |k| alone decides.
  for (int j = 0; j < head_dim; ++j)
    restore[j] = n_alive == 0 ? 0x3c00u : alive(j) ? Weight(rms / weight(j)) : uint16_t{0};
}

void MakeTierTable(const float* query_energy, const float* key_energy, int head_dim,
                   uint16_t* restore) {
  // A channel that the first queries hardly read may be read later: its keys get no less than what
  // a thousandth of the mean is worth.
  double mean = 0.0;
  for (int j = 0; j < head_dim; ++j)
    mean += std::isfinite(query_energy[j]) ? double(query_energy[j]) : 0.0;
  mean = mean > 0.0 ? mean / head_dim : 1.0;
  std::vector<double> weight(static_cast<size_t>(head_dim)), energy(weight.size());
  double sum = 0.0;
  for (size_t j = 0; j < weight.size(); ++j) {
    const double q = std::isfinite(query_energy[j]) ? double(query_energy[j]) : mean;
    const double k = std::isfinite(key_energy[j]) ? double(key_energy[j]) : 0.0;
    weight[j] = std::sqrt(std::fmax(q, 1e-3 * mean));
    energy[j] = q * k;
    sum += weight[j] * weight[j] * k;
  }
  const double rms = sum > 0.0 ? std::sqrt(sum / head_dim) : std::sqrt(mean);
  const int per_tier = head_dim / kTiers;
  std::vector<int> order(weight.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int x, int y) { return energy[size_t(x)] > energy[size_t(y)]; });
  std::array<double, kTiers> in_tier = {};
  for (int i = 0; i < head_dim; ++i) {
    const int j = order[size_t(i)], tier = i / per_tier;
    const double w = weight[size_t(j)], k = key_energy[j];
    restore[j] = uint16_t((Weight(rms / w) & ~unsigned{kTierMarks}) | unsigned(tier));
    in_tier[size_t(tier)] += std::isfinite(k) ? w * w * k : 0.0;
  }
  for (size_t t = 0; t + 1 < kTiers; ++t) {
    // Nothing is known of a tier without energy: no bits are taken from it for that.
    const bool known = in_tier[t + 1] > 0.0 && std::isfinite(in_tier[t] / in_tier[t + 1]);
    const double fall = known ? 10.0 * std::log10(in_tier[t] / in_tier[t + 1]) : 0.0;
    SetTierFall(int(t), std::clamp(int(std::lround(fall * kFallSteps)), 0, kMostFall), restore);
  }
}

void ExpandTable(const uint16_t* restore, int head_dim, float* out) {
  // Each layer of each step comes here: no branch depends on a weight, and the next free place of
  // each tier, 16 bits, stays in a register.
  for (int j = 0; j < head_dim; ++j) out[j] = HalfToFloat(restore[j]);
  for (int j = 0; j < head_dim; ++j) out[head_dim + j] = out[j] > 0.0f ? 1.0f / out[j] : 0.0f;
  const auto bits_of = [&](int j) { return 16 * TierOf(restore[j]); };
  uint64_t in_tier = 0;
  for (int j = 0; j < head_dim; ++j) in_tier += uint64_t{1} << bits_of(j);
  uint64_t next = (in_tier << 16) + (in_tier << 32) + (in_tier << 48);
  float* order = out + 2 * head_dim;
  for (int j = 0; j < head_dim; ++j) {
    order[next >> bits_of(j) & 0xffff] = float(j);
    next += uint64_t{1} << bits_of(j);
  }
}

}  // namespace sparkv

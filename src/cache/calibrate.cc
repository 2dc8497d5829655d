// A cache that measures a model, and one that was told what to expect of it.
#include <algorithm>
#include <cmath>
#include <string>

#include "base/half.h"
#include "cache/kv_cache.h"
#include "config/config.h"
#include "method/observe.h"

namespace sparkv {

void KvCache::StartCalibration() {
  model_ = Model::kMeasured;
  sums_.assign(layout_.layers.size(), {});
}

// Queries and keys of the tokens in flight. Sinks have no say: they stay dense. Nor have tokens
// whose queries do not come with those of all others (streams that are attended one by one).
void KvCache::CountEnergies(const sparkv_attend_args& args) {
  const LayerLayout& layer = layout_.layers[size_t(args.layer)];
  EnergySums& sums = sums_[size_t(args.layer)];
  sums.rope_rot = args.rope_rot;
  sums.rope_neox = args.rope_neox != 0;
  sums.queries.resize(layer.k_row());
  sums.keys.resize(layer.k_row());
  std::vector<float> energies(layer.k_row());
  const auto add = [](double x, double* sum) {
    if (std::isfinite(x)) *sum += x;
  };
  for (int64_t i = 0; i < args.n_streams * args.n_tokens; ++i) {
    const int64_t cell = FlightOf(args, int(i / args.n_tokens), i % args.n_tokens);
    if (cell < 0 || cells_.rank(cell) < config_.sinks) continue;
    QueryEnergies(args, cell, SPARKV_GROUP_ENERGY, energies.data());
    const uint16_t* k = flight_keys_.data() + size_t(i) * layer.k_row();
    for (size_t j = 0; j < layer.k_row(); ++j) {
      add(energies[j], &sums.queries[j]);
      const double x = HalfToFloat(k[j]);
      add(x * x, &sums.keys[j]);
    }
    ++sums.n;
  }
}

// Layers that saw no token are left out.
Calibration KvCache::Measured() const {
  Calibration measured;
  for (size_t i = 0; i < sums_.size(); ++i) {
    const EnergySums& sums = sums_[i];
    if (sums.n == 0) continue;
    const LayerLayout& layer = layout_.layers[i];
    LayerEnergies energies{layer.number, layer.n_kv_heads, layer.k_dim(), {}, {}};
    const auto mean = [&](const std::vector<double>& from, std::vector<float>* to) {
      for (const double x : from) to->push_back(float(std::min(x / double(sums.n), 1e30)));
      for (int h = 0; h < layer.n_kv_heads; ++h) {
        ShareInPairs(to->data() + size_t(h) * size_t(layer.k_dim()), layer.k_dim(), sums.rope_rot,
                     sums.rope_neox);
      }
    };
    mean(sums.queries, &energies.queries);
    mean(sums.keys, &energies.keys);
    measured.layers.push_back(std::move(energies));
  }
  return measured;
}

Status KvCache::LoadCalibration(const void* bytes, size_t size) {
  Calibration read;
  if (Status s = ReadCalibration(bytes, size, &read); !s.ok()) return s;
  if (baseline_.codec != Codec::kNone)
    return Status::Invalid("calibration: does not go with a baseline");
  if (calibrated_ != 0 || model_ == Model::kMeasured || next_order_ > 1)
    return Status::Invalid("calibration: comes before all else, and once");
  for (const LayerLayout& layer : layout_.layers) {
    const LayerEnergies* energies = read.Layer(layer.number);
    const std::string made_for =
        "calibration: made for " + (read.model.empty() ? "a model" : Quote(read.model));
    if (energies == nullptr)
      return Status::Invalid(made_for + " without layer " + std::to_string(layer.number));
    if (energies->n_kv_heads != layer.n_kv_heads || energies->k_dim != layer.k_dim()) {
      return Status::Invalid(made_for + ", whose layer " + std::to_string(layer.number) + " has " +
                             std::to_string(energies->n_kv_heads) + " x " +
                             std::to_string(energies->k_dim) + " key channels, not " +
                             std::to_string(layer.n_kv_heads) + " x " +
                             std::to_string(layer.k_dim()));
    }
  }
  const uint16_t id = tables_.Make();
  if (id == 0) return Status::NoMemory("calibration: no room for its weights");
  for (const LayerLayout& layer : layout_.layers) {
    if (!layer.has_table) continue;
    const LayerEnergies& energies = *read.Layer(layer.number);
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      const size_t at = size_t(h) * size_t(layer.k_dim());
      FillTable(layer, id, h, energies.queries.data() + at, energies.keys.data() + at);
    }
  }
  calibrated_ = id;
  calibration_ = std::move(read);
  model_ = Model::kUntold;
  sums_.assign(layout_.layers.size(), {});
  return Status::Ok();
}

// Whether the first tokens use the channels as the calibrated model does; rows packed for another
// one would be far off.
Status KvCache::TellModel() {
  if (model_ == Model::kUntold) {
    if (step_.open || sums_.front().n < kTokensToTell) return Status::Ok();
    const Calibration seen = Measured();
    likeness_ = 0.0;
    for (const LayerEnergies& layer : seen.layers) {
      const LayerEnergies& expected = *calibration_.Layer(layer.number);
      for (const auto& [a, b] :
           {std::pair(&layer.queries, &expected.queries), std::pair(&layer.keys, &expected.keys)}) {
        likeness_ += LikenessOf(a->data(), b->data(), layer.n_kv_heads, layer.k_dim) /
                     (2.0 * double(seen.layers.size()));
      }
    }
    sums_.assign(layout_.layers.size(), {});
    model_ = likeness_ >= kLeastLikeness ? Model::kTold : Model::kOther;
  }
  if (model_ != Model::kOther) return Status::Ok();
  return Status::Invalid("calibration: made for another model" +
                         (calibration_.model.empty() ? "" : ", " + Quote(calibration_.model)) +
                         ": the energies of its channels and those of the first tokens correlate "
                         "by " +
                         std::to_string(likeness_).substr(0, 5) + ", at least 0.3 expected");
}

}  // namespace sparkv

#include "cache/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checksum.h"
#include "config/config.h"
#include "config/layers.h"
#include "format/row_layout.h"

namespace sparkv {
namespace {

constexpr char kMagic[8] = {'s', 'p', 'a', 'r', 'k', 'v', 'c', '1'};

struct Header {
  char magic[8];
  uint64_t checksum;  // of everything behind it
  char model[128];    // zero-terminated
  char sensitivity[512];
  uint32_t n_layers;
  uint32_t reserved;
};
static_assert(sizeof(Header) == 664);

struct LayerHeader {
  int32_t number, n_kv_heads, k_dim;
  uint32_t reserved;
};
static_assert(sizeof(LayerHeader) == 16);

constexpr uint32_t kMaxLayers = 4096;

template <size_t kSize>
bool TakeText(const char (&field)[kSize], std::string* text) {
  const void* end = std::memchr(field, 0, kSize);
  if (end == nullptr) return false;
  *text = field;
  return true;
}

template <size_t kSize>
void PutText(const std::string& text, char (&field)[kSize]) {
  std::memcpy(field, text.data(), std::min(text.size(), kSize - 1));
}

}  // namespace

const LayerEnergies* Calibration::Layer(int32_t number) const {
  const auto found = std::find_if(layers.begin(), layers.end(),
                                  [&](const LayerEnergies& l) { return l.number == number; });
  return found == layers.end() ? nullptr : &*found;
}

std::string CalibrationBytes(const Calibration& calibration) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  PutText(calibration.model, header.model);
  PutText(calibration.sensitivity, header.sensitivity);
  header.n_layers = uint32_t(calibration.layers.size());
  std::string bytes(sizeof(header), '\0');
  for (const LayerEnergies& layer : calibration.layers) {
    const LayerHeader head{layer.number, layer.n_kv_heads, layer.k_dim, 0};
    bytes.append(reinterpret_cast<const char*>(&head), sizeof(head));
    for (const auto* energies : {&layer.queries, &layer.keys}) {
      bytes.append(reinterpret_cast<const char*>(energies->data()),
                   energies->size() * sizeof(float));
    }
  }
  std::memcpy(bytes.data(), &header, sizeof(header));
  header.checksum = Fnv1a(bytes.data() + 16, bytes.size() - 16);
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

Status ReadCalibration(const void* bytes, size_t size, Calibration* calibration) {
  const auto corrupt = [](const std::string& text) {
    return Status::Corrupt("calibration" + text);
  };
  Header header;
  if (bytes == nullptr || size < sizeof(header))
    return corrupt(": " + std::to_string(size) + " bytes are no header");
  std::memcpy(&header, bytes, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    return corrupt(".magic: not sparkvc1");
  const uint8_t* in = static_cast<const uint8_t*>(bytes);
  if (header.checksum != Fnv1a(in + 16, size - 16)) return corrupt(".checksum: bytes are damaged");
  Calibration read;
  if (!TakeText(header.model, &read.model)) return corrupt(".model: has no end");
  if (!TakeText(header.sensitivity, &read.sensitivity)) return corrupt(".sensitivity: has no end");
  sparkv_config unused{};
  if (Status s = SetSensitivity(read.sensitivity, &unused); !s.ok()) return corrupt("." + s.text);
  if (header.n_layers < 1 || header.n_layers > kMaxLayers) {
    return corrupt(".layers: " + std::to_string(header.n_layers) + " is outside [1, " +
                   std::to_string(kMaxLayers) + "]");
  }
  size_t at = sizeof(header);
  for (uint32_t i = 0; i < header.n_layers; ++i) {
    const std::string name = ".layers[" + std::to_string(i) + "]";
    LayerHeader head;
    if (size - at < sizeof(head)) return corrupt(name + ": the bytes end before it");
    std::memcpy(&head, in + at, sizeof(head));
    at += sizeof(head);
    LayerEnergies layer{head.number, head.n_kv_heads, head.k_dim, {}, {}};
    if (head.number < 0 || head.number > kMaxLayer || read.Layer(head.number) != nullptr)
      return corrupt(name + ".number: " + std::to_string(head.number) + " is outside or twice");
    if (head.n_kv_heads < 1 || head.n_kv_heads > 1024)
      return corrupt(name + ".n_kv_heads: " + std::to_string(head.n_kv_heads));
    if (!HeadDimAllowed(head.k_dim)) return corrupt(name + ".k_dim: " + std::to_string(head.k_dim));
    for (auto* energies : {&layer.queries, &layer.keys}) {
      const size_t n = layer.size();
      if ((size - at) / sizeof(float) < n) return corrupt(name + ": the bytes end inside it");
      energies->resize(n);
      std::memcpy(energies->data(), in + at, n * sizeof(float));
      at += n * sizeof(float);
      for (const float x : *energies) {
        if (!std::isfinite(x) || x < 0.0f) return corrupt(name + ": an energy is no number >= 0");
      }
    }
    read.layers.push_back(std::move(layer));
  }
  if (at != size) return corrupt(": " + std::to_string(size - at) + " bytes too many");
  *calibration = std::move(read);
  return Status::Ok();
}

Status ApplyCalibration(const Calibration& calibration, sparkv_config* config) {
  if (calibration.sensitivity.empty()) return Status::Ok();
  sparkv_config next = *config;
  if (next.sensitivity[0] == '\0') {
    if (Status s = SetSensitivity(calibration.sensitivity, &next); !s.ok()) return s;
  }
  const bool tiered = TierBits(sparkv_number(next.kept), 0) > 0;
  if (tiered && next.budget[0] == '\0' && next.layers[0] == '\0') {
    if (Status s = SetBudget("auto", &next); !s.ok()) return s;
  }
  *config = next;
  return Status::Ok();
}

double LikenessOf(const float* a, const float* b, int n_heads, int dim) {
  double likeness = 0.0;
  for (int h = 0; h < n_heads; ++h, a += dim, b += dim) {
    // Channels without energy say nothing about how different the others are.
    const auto value = [](float x) { return std::log(double(x) + 1e-20); };
    double sum_a = 0, sum_b = 0, aa = 0, bb = 0, ab = 0;
    for (int j = 0; j < dim; ++j) {
      const double x = value(a[j]), y = value(b[j]);
      sum_a += x, sum_b += y, aa += x * x, bb += y * y, ab += x * y;
    }
    const double n = dim, va = aa - sum_a * sum_a / n, vb = bb - sum_b * sum_b / n;
    // All channels alike tell nothing: no reason to refuse.
    const bool tells = va > 1e-9 * n && vb > 1e-9 * n;
    likeness += tells ? (ab - sum_a * sum_b / n) / std::sqrt(va * vb) : 1.0;
  }
  return likeness / n_heads;
}

}  // namespace sparkv

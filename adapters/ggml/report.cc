#include "report.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sparkv {
namespace {

constexpr double kMiB = 1024.0 * 1024.0;

std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string Format(const char* format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  std::string text(static_cast<size_t>(std::max(0, std::vsnprintf(nullptr, 0, format, args))),
                   '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  va_end(args);
  return text;
}

std::string ConfigText(const sparkv_config& config) {
  std::string text(sparkv_config_text(&config, nullptr, 0) + 1, '\0');
  sparkv_config_text(&config, text.data(), text.size());
  text.resize(std::strlen(text.c_str()));
  return text;
}

// The fields that caches and totals share.
std::string Fields(const CacheReport& report) {
  const sparkv_memory& m = report.memory;
  return Format(
      "\"keys_bits_per_element\": %.4f, \"values_bits_per_element\": %.4f, \"bits_per_element\": "
      "%.4f, "
      "\"resident_bytes\": %llu, \"peak_bytes\": %llu, \"f16_bytes\": %llu, \"tokens\": %lld, "
      "\"evicted\": %lld",
      m.key_bits, m.value_bits, m.bits, static_cast<unsigned long long>(m.resident),
      static_cast<unsigned long long>(m.peak), static_cast<unsigned long long>(m.f16_bytes),
      static_cast<long long>(m.tokens), static_cast<long long>(m.evicted));
}

std::string Kinds(const sparkv_memory& m) {
  const struct {
    const char* name;
    uint64_t bytes;
  } kinds[] = {{"key_masks", m.key_masks},
               {"key_signs", m.key_signs},
               {"key_scales", m.key_scales},
               {"key_kept", m.key_kept},
               {"value_scales", m.value_scales},
               {"value_codes", m.value_codes},
               {"dense_keys", m.dense_keys},
               {"dense_values", m.dense_values},
               {"tables", m.tables},
               {"cells", m.cells},
               {"slack", m.slack},
               {"workspace", m.workspace}};
  std::string json;
  for (const auto& kind : kinds) {
    json += Format("%s\"%s\": %llu", json.empty() ? "" : ", ", kind.name,
                   static_cast<unsigned long long>(kind.bytes));
  }
  return json;
}

std::string Errors(const CacheReport& report) {
  std::string json;
  const auto numbers = [](const std::vector<double>& list) {
    std::string text;
    for (const double x : list) text += Format("%s%.5g", text.empty() ? "" : ", ", x);
    return text;
  };
  for (const LayerErrors& layer : report.errors) {
    json += Format("%s{\"layer\": %d, \"keys\": [%s], \"values\": [%s]}",
                   json.empty() ? ",\n   \"errors\": [" : ",\n    ", layer.layer,
                   numbers(layer.keys).c_str(), numbers(layer.values).c_str());
  }
  return json.empty() ? "" : json + "]";
}

// Sums; peaks of different caches need not coincide, so the sum is an upper bound. Bits are
// weighted by elements.
CacheReport Total(const std::vector<CacheReport>& reports) {
  CacheReport total;
  double keys = 0, values = 0, key_bits = 0, value_bits = 0;
  for (const CacheReport& report : reports) {
    const sparkv_memory& m = report.memory;
    total.memory.tokens += m.tokens;
    total.memory.evicted += m.evicted;
    total.memory.resident += m.resident;
    total.memory.peak += m.peak;
    total.memory.f16_bytes += m.f16_bytes;
    const double n_keys = static_cast<double>(m.tokens) * static_cast<double>(report.key_elements);
    const double n_values =
        static_cast<double>(m.tokens) * static_cast<double>(report.value_elements);
    keys += n_keys;
    values += n_values;
    key_bits += m.key_bits * n_keys;
    value_bits += m.value_bits * n_values;
  }
  total.memory.key_bits = keys > 0 ? key_bits / keys : 0;
  total.memory.value_bits = values > 0 ? value_bits / values : 0;
  total.memory.bits = keys + values > 0 ? (key_bits + value_bits) / (keys + values) : 0;
  return total;
}

std::string Hex(const uint8_t* bytes, size_t n) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

bool WriteAll(int file, const std::string& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = write(file, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

}  // namespace

CacheReport MakeReport(const sparkv_cache* cache, const std::vector<sparkv_layer_shape>& layers,
                       const std::string& budget_layers) {
  CacheReport report;
  report.budget_layers = budget_layers;
  report.memory.struct_size = sizeof(report.memory);
  sparkv_cache_high_water(cache, &report.memory);
  report.n_layers = static_cast<int>(layers.size());
  for (const sparkv_layer_shape& layer : layers) {
    report.key_elements += int64_t{layer.n_kv_heads} * layer.k_dim;
    report.value_elements += int64_t{layer.n_kv_heads} * layer.v_dim;
  }
  return report;
}

LayerErrors ErrorsOf(const sparkv_cache* cache, int index, int layer, int n_kv_heads) {
  LayerErrors errors{layer, {}, {}};
  for (int h = 0; h < n_kv_heads; ++h) {
    double keys = 0, values = 0;
    if (sparkv_cache_errors(cache, index, h, &keys, &values, nullptr) != SPARKV_OK) break;
    errors.keys.push_back(keys);
    errors.values.push_back(values);
  }
  return errors;
}

std::string ReportLine(const CacheReport& report) {
  const sparkv_memory& m = report.memory;
  return Format(
      "%lld tokens in %d layers: keys %.2f, values %.2f, together %.2f bits per element; resident "
      "%.2f MiB, "
      "peak %.2f MiB, f16 %.2f MiB",
      static_cast<long long>(m.tokens), report.n_layers, m.key_bits, m.value_bits, m.bits,
      static_cast<double>(m.resident) / kMiB, static_cast<double>(m.peak) / kMiB,
      static_cast<double>(m.f16_bytes) / kMiB);
}

std::string StatsJson(const Options& options, const std::string& isa,
                      const std::vector<CacheReport>& reports) {
  std::string json = Format(
      "{\"preset\": \"%s\", \"config\": \"%s\", \"isa\": \"%s\", \"version\": \"%s\",\n ",
      options.config.preset, ConfigText(options.config).c_str(), isa.c_str(), sparkv_version());
  json += Fields(Total(reports)) + ",\n \"caches\": [";
  for (size_t i = 0; i < reports.size(); ++i) {
    json += Format("%s\n  {\"layers\": %d, ", i == 0 ? "" : ",", reports[i].n_layers) +
            Fields(reports[i]) +
            (reports[i].budget_layers.empty()
                 ? ""
                 : ",\n   \"budget_layers\": \"" + reports[i].budget_layers + "\"") +
            ",\n   \"memory\": {" + Kinds(reports[i].memory) + "}" + Errors(reports[i]) + "}";
  }
  return json + "]}\n";
}

std::string SaliencyJson(sparkv_cache* cache, int layer, int head, int head_dim) {
  sparkv_memory now = {};
  now.struct_size = sizeof(now);
  sparkv_cache_memory(cache, &now);
  const size_t dim = static_cast<size_t>(head_dim);
  std::vector<float> saliency(static_cast<size_t>(now.tokens) * dim);
  std::vector<uint8_t> kept(saliency.size());
  const int64_t n =
      sparkv_cache_saliency(cache, layer, head, now.tokens, saliency.data(), kept.data());

  std::string masks, rows;
  std::vector<uint8_t> bits((dim + 7) / 8), bytes(dim);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(bits.begin(), bits.end(), 0);
    for (size_t j = 0; j < dim; ++j) {
      const size_t at = static_cast<size_t>(i) * dim + j;
      if (kept[at]) bits[j / 8] = static_cast<uint8_t>(bits[j / 8] | (1u << (j % 8)));
      bytes[j] = static_cast<uint8_t>(std::lround(255.0f * std::clamp(saliency[at], 0.0f, 1.0f)));
    }
    const char* comma = i == 0 ? "\"" : ", \"";
    masks += comma + Hex(bits.data(), bits.size()) + "\"";
    rows += comma + Hex(bytes.data(), bytes.size()) + "\"";
  }
  return Format("{\"layer\": %d, \"head\": %d, \"head_dim\": %d, \"tokens\": %lld,\n \"kept\": [",
                layer, head, head_dim, static_cast<long long>(n)) +
         masks + "],\n \"saliency\": [" + rows + "]}\n";
}

bool WriteFile(const std::string& path, const std::string& bytes) {
  struct stat found = {};
  const bool exists = stat(path.c_str(), &found) == 0;
  if (exists && !S_ISREG(found.st_mode)) {
    // A device or a pipe is written to; a new file must never take its place.
    const int file = open(path.c_str(), O_WRONLY | O_CLOEXEC);
    const bool ok = file >= 0 && WriteAll(file, bytes);
    const int error = errno;
    if (file >= 0) close(file);
    if (!ok) Log(LogLevel::kError, "cannot write %s: %s", path.c_str(), std::strerror(error));
    return ok;
  }
  // A link stays a link: what it names is replaced.
  std::string target = path;
  if (char* real = exists ? realpath(path.c_str(), nullptr) : nullptr) {
    target = real;
    std::free(real);
  }
  const std::string temporary = target + Format(".%d.tmp", static_cast<int>(getpid()));
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  bool ok = file >= 0 && WriteAll(file, bytes) && fsync(file) == 0;
  const int write_error = errno;
  if (file >= 0 && close(file) != 0) ok = false;
  if (ok && std::rename(temporary.c_str(), target.c_str()) == 0) return true;
  const int error = ok ? errno : write_error;
  if (file >= 0) unlink(temporary.c_str());
  Log(LogLevel::kError, "cannot write %s: %s", path.c_str(), std::strerror(error));
  return false;
}

bool ReadFile(const std::string& path, std::string* bytes, std::string* reason) {
  struct stat found = {};
  if (stat(path.c_str(), &found) != 0) return false;
  if (!S_ISREG(found.st_mode)) {
    *reason = "not a regular file";
    return false;
  }
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  bool ok = file >= 0;
  bytes->clear();
  for (char chunk[1 << 16]; ok;) {
    const ssize_t n = read(file, chunk, sizeof(chunk));
    if (n < 0 && errno == EINTR) continue;
    ok = n >= 0;
    if (n <= 0) break;
    bytes->append(chunk, static_cast<size_t>(n));
  }
  const int error = errno;
  if (file >= 0) close(file);
  if (!ok) *reason = std::strerror(error);
  return ok;
}

bool MayReplace(const std::string& path, const std::string& magic) {
  struct stat found = {};
  if (stat(path.c_str(), &found) != 0 || !S_ISREG(found.st_mode) || found.st_size == 0) return true;
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  std::string begin(magic.size(), '\0');
  const ssize_t n = read(file, begin.data(), begin.size());
  close(file);
  return n == static_cast<ssize_t>(begin.size()) && begin == magic;
}

}  // namespace sparkv

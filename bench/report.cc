#include "report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

namespace sparkv::bench {

double Report::Row::At(double share) const {
  const double at = share * double(seconds.size() - 1);
  const size_t low = size_t(at), high = std::min(low + 1, seconds.size() - 1);
  return seconds[low] + (at - double(low)) * (seconds[high] - seconds[low]);
}

void Report::ReportRuns(const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    if (run.run_type != Run::RT_Iteration || run.error_occurred) continue;
    for (Row& row : rows_) {
      if (row.c.name() != run.run_name.function_name) continue;
      row.seconds.push_back(run.real_accumulated_time / double(run.iterations));
      std::sort(row.seconds.begin(), row.seconds.end());
    }
  }
}

Report::Bound Report::BoundOf(const Row& row) const {
  const Limits& limits = limits_.at(row.c.threads);
  return {row.bytes / limits.bytes_per_second,
          row.c.multiply_adds() / limits.multiply_adds_per_second};
}

double Report::AgainstGgml(const Row& row) const {
  Case opponent = row.c;
  opponent.side = "ggml-f16";
  opponent.simd.clear();
  for (const Row& other : rows_) {
    if (other.c.name() == opponent.name() && !other.seconds.empty())
      return other.At(0.5) / row.At(0.5);
  }
  return 0.0;
}

std::string Report::Machine() const {
  return CpuName() + ", " + std::to_string(std::thread::hardware_concurrency()) + " CPUs";
}

void Report::PrintTable() const {
  const Shape& shape = options_.shape;
  size_t repetitions = 0;
  for (const Row& row : rows_) repetitions = std::max(repetitions, row.seconds.size());
  if (repetitions == 0) return;  // rows were listed
  std::printf(
      "%s, load %.2f before, %.2f after. One layer, head size %d, %d KV heads, group %d; each step "
      "looks at the mask, which one layer of a model does for all.\n"
      "Medians of %zu; spread: between the quartiles. Bound: what the bytes (b, from memory, not "
      "from a CPU's cache) or the f32 multiply-adds (m) take\n",
      Machine().c_str(), load_at_start_, Load(), shape.dim, shape.kv_heads, shape.group,
      repetitions);
  for (const auto& [threads, limits] : limits_) {
    std::printf("%s %d %s: %.1f GB/s, %.1f G multiply-adds/s",
                threads == limits_.begin()->first ? "at the best rate measured here with" : ";",
                threads, threads == 1 ? "thread" : "threads", limits.bytes_per_second / 1e9,
                limits.multiply_adds_per_second / 1e9);
  }
  std::printf(".\n\n%-8s %-14s %-7s %7s %7s %5s %7s %14s %10s %7s %10s   %8s %8s %11s\n", "what",
              "side", "simd", "tokens", "packed", "rows", "threads", "sequences", "median us",
              "spread", "bound us", "x bound", "ggml-f16", "rows/s");
  for (const Row& row : rows_) {
    if (row.seconds.empty()) continue;
    const Case& c = row.c;
    const Bound bound = BoundOf(row);
    const double most = std::max(bound.bytes, bound.multiply_adds), against = AgainstGgml(row);
    std::string sequences = std::to_string(c.sequences), against_text = "-", packed = "-";
    if (row.packed >= 0)
      packed = std::to_string(100 * row.packed / (int64_t{c.tokens} * c.sequences)) + " %";
    if (c.sequences > 1) sequences += " " + c.streams;
    if (against > 0.0) {
      char text[16];
      std::snprintf(text, sizeof(text), "%.2fx", against);
      against_text = text;
    }
    std::printf("%-8s %-14s %-7s %7s %7s %5d %7d %14s %10.1f %5.1f %% %10.2f %c %8.1f %8s %11.0f\n",
                c.what.c_str(), c.side.c_str(), c.simd.empty() ? "-" : c.simd.c_str(),
                c.attends() ? std::to_string(c.tokens).c_str() : "-", packed.c_str(), c.queries,
                c.threads, sequences.c_str(), row.At(0.5) * 1e6, 100.0 * row.spread(), most * 1e6,
                bound.bytes >= bound.multiply_adds ? 'b' : 'm', row.At(0.5) / most,
                against_text.c_str(), row.rows_per_second());
  }
}

void Report::WriteJson() const {
  using Json = nlohmann::ordered_json;
  const Shape& shape = options_.shape;
  Json json{
      {"kind", "attend"},
      {"machine", Machine()},
      {"version", sparkv_version()},
      {"load", {load_at_start_, Load()}},
      {"shape", {{"head_dim", shape.dim}, {"kv_heads", shape.kv_heads}, {"group", shape.group}}}};
  for (const auto& [threads, limits] : limits_) {
    json["limits"].push_back({{"threads", threads},
                              {"bytes_per_s", limits.bytes_per_second},
                              {"multiply_adds_per_s", limits.multiply_adds_per_second}});
  }
  json["rows"] = Json::array();
  for (const Row& row : rows_) {
    if (row.seconds.empty()) continue;
    const Case& c = row.c;
    const Bound bound = BoundOf(row);
    Json times = Json::array();
    for (const double s : row.seconds) times.push_back(s * 1e6);
    json["rows"].push_back({{"name", c.name()},
                            {"what", c.what},
                            {"side", c.side},
                            {"simd", c.simd},
                            {"tokens", c.tokens},
                            {"rows", c.queries},
                            {"threads", c.threads},
                            {"sequences", c.sequences},
                            {"streams", c.streams},
                            {"median_us", row.At(0.5) * 1e6},
                            {"spread", row.spread()},
                            {"times_us", times},
                            {"rows_per_s", row.rows_per_second()},
                            {"bytes", row.bytes},
                            {"packed", row.packed},
                            {"multiply_adds", c.multiply_adds()},
                            {"byte_bound_us", bound.bytes * 1e6},
                            {"multiply_add_bound_us", bound.multiply_adds * 1e6}});
  }
  std::ofstream file(options_.out);
  file << json.dump(1) << "\n";
  file.close();
  if (!file) Fail(1, "--out: cannot write " + options_.out);
}

}  // namespace sparkv::bench

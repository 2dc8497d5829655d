// Collects the runs of all cases; in the end a table a person can quote and a JSON file.
#pragma once

#include <benchmark/benchmark.h>

#include <map>
#include <string>
#include <vector>

#include "bench.h"
#include "machine.h"
#include "options.h"

namespace sparkv::bench {

class Report : public benchmark::BenchmarkReporter {
 public:
  Report(const Options& options, std::map<int, Limits> limits)
      : options_(options), limits_(std::move(limits)), load_at_start_(Load()) {}

  // The rows of the table keep this order, whatever order they are measured in.
  void Add(const Case& c) { rows_.push_back({c, 0.0, -1, {}}); }
  void SetData(size_t row, double bytes, int64_t packed) {
    rows_[row].bytes = bytes;
    rows_[row].packed = packed;
  }

  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override;
  void PrintTable() const;
  void WriteJson() const;

 private:
  struct Row {
    Case c;
    double bytes;
    int64_t packed;
    std::vector<double> seconds;  // sorted, one per repetition

    double At(double share) const;  // 0.5: the median
    double spread() const { return (At(0.75) - At(0.25)) / At(0.5); }
    double rows_per_second() const { return c.queries * c.sequences / At(0.5); }
  };
  // Seconds that the step takes at least.
  struct Bound {
    double bytes, multiply_adds;
  };
  Bound BoundOf(const Row& row) const;
  double AgainstGgml(const Row& row) const;  // how many times as fast as ggml-f16, 0 = not measured
  std::string Machine() const;

  const Options& options_;
  std::map<int, Limits> limits_;  // by threads
  double load_at_start_;
  std::vector<Row> rows_;
};

}  // namespace sparkv::bench

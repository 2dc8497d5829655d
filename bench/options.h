// The command line. Anything wrong in it is one line and exit code 2.
#pragma once

#include <string>
#include <vector>

#include "bench.h"

namespace sparkv::bench {

// Lists make every combination a row.
struct Options {
  std::vector<std::string> what = {"decode", "prefill", "seal", "append"};
  std::vector<std::string> presets = {"exact",        "balanced",     "spark-0.5",
                                      "spark-0.5-i8", "spark-0.5-i5", "spark-0.8-i4"};
  std::vector<std::string> simd;  // names of what this CPU has
  std::vector<std::string> streams = {"split", "unified"};
  std::vector<int> tokens = {8192}, threads = {1}, sequences = {1};
  int queries = 512;
  Shape shape;
  std::string out;  // JSON file, "" = none
};

// argv after Google Benchmark took what is its own.
Options ParseOptions(int argc, char** argv);
void PrintHelp();

}  // namespace sparkv::bench

// Kernels alone: attention of decode and prefill, packing, and the write of new rows, through our
// cache and through ggml's operators over tensors of the same shape. All rows take turns in one
// run, or they drift apart on a shared machine. `attend_bench --help` lists what can be varied.
#include <benchmark/benchmark.h>

#include <cstring>
#include <iostream>
#include <new>

#include "bench.h"
#include "machine.h"
#include "options.h"
#include "report.h"

namespace sparkv::bench {
namespace {

std::vector<Case> CasesOf(const Options& o) {
  std::vector<Case> cases;
  // Ours on every instruction set, then the opponents.
  const auto add = [&](Case c) {
    c.shape = o.shape;
    for (const std::string& preset : o.presets) {
      for (const std::string& simd : o.simd) {
        c.side = preset;
        c.simd = simd;
        cases.push_back(c);
      }
    }
    c.simd.clear();
    if (c.what == "seal") return;  // ggml packs while it writes: append
    for (const std::string& name : GgmlNames(o.shape)) {
      c.side = name;
      cases.push_back(c);
    }
  };
  for (const std::string& what : o.what) {
    Case c;
    c.what = what;
    if (what == "append") {
      add(c);
      c.queries = o.queries;
      if (o.queries > 1) add(c);
      continue;
    }
    for (const int threads : o.threads) {
      c.threads = threads;
      c.queries = what == "decode" ? 1 : o.queries;
      if (what == "seal") {
        add(c);
        continue;
      }
      for (const int tokens : o.tokens) {
        c.tokens = tokens;
        if (what == "prefill") {
          add(c);
          continue;
        }
        for (const int sequences : o.sequences) {
          c.sequences = sequences;
          for (const std::string& streams : o.streams) {
            c.streams = sequences > 1 ? streams : "split";
            if (sequences > 1 || streams == o.streams.front()) add(c);
          }
        }
      }
    }
  }
  return cases;
}

std::unique_ptr<Side> MakeSide(const Case& c) {
  const bool ggml = c.simd.empty();
  if (c.what == "seal") return SparkvSeal(c);
  if (c.what == "append") return ggml ? GgmlAppend(c) : SparkvAppend(c);
  return ggml ? GgmlAttend(c) : SparkvAttend(c);
}

// Cases with the same key read the same cached rows.
std::string DataKey(Case c) {
  if (c.attends()) c.what = "decode", c.queries = c.threads = 1;
  return c.name();
}

int Main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) {
      PrintHelp();
      return 0;
    }
  }
  std::vector<char*> args(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true",
       repeat[] = "--benchmark_repetitions=9", least[] = "--benchmark_min_time=0.1";
  args.insert(args.begin() + 1, {interleave, repeat, least});
  int n = int(args.size());
  benchmark::Initialize(&n, args.data());
  const Options options = ParseOptions(n, args.data());

  const std::vector<Case> cases = CasesOf(options);
  std::map<int, Limits> limits;
  for (const Case& c : cases) {
    if (limits.count(c.threads) == 0) limits[c.threads] = MeasureLimits(c.threads);
  }
  std::cerr << "attend_bench: " << cases.size() << " rows take turns; the table comes at the end\n";
  Report report(options, std::move(limits));
  std::map<std::string, std::unique_ptr<Side>> sides;
  for (size_t row = 0; row < cases.size(); ++row) {
    const Case& c = cases[row];
    report.Add(c);
    benchmark::RegisterBenchmark(c.name().c_str(), [&, row](benchmark::State& state) {
      std::unique_ptr<Side>& side = sides[DataKey(c)];
      if (side == nullptr) side = MakeSide(c);
      side->Prepare(c);
      report.SetData(row, side->bytes(), side->packed());
      for (auto _ : state) side->Step();
    })->UseRealTime();
  }
  if (benchmark::RunSpecifiedBenchmarks(&report) == 0) Fail(2, "no row matches the filter");
  report.PrintTable();
  if (!options.out.empty()) report.WriteJson();
  return 0;
}

}  // namespace
}  // namespace sparkv::bench

int main(int argc, char** argv) {
  try {
    return sparkv::bench::Main(argc, argv);
  } catch (const std::bad_alloc&) {
    sparkv::bench::Fail(1, "no memory for these rows");
  }
}

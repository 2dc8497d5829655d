#include "options.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iostream>
#include <set>
#include <string_view>

#include "ops/op_table.h"

namespace sparkv::bench {
namespace {

std::vector<std::string> Split(std::string_view text) {
  std::vector<std::string> parts;
  for (;;) {
    const size_t comma = text.find(',');
    parts.emplace_back(text.substr(0, comma));
    if (comma == text.npos) return parts;
    text.remove_prefix(comma + 1);
  }
}

int Number(const std::string& flag, const std::string& text, int most) {
  int number = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (failed != std::errc() || end != text.data() + text.size() || number < 1 || number > most) {
    Fail(2, flag + ": '" + text + "' is not a number in [1, " + std::to_string(most) + "]");
  }
  return number;
}

// A row that is there twice would have the times of both.
template <typename T>
std::vector<T> Distinct(const std::string& flag, const std::string& text, std::vector<T> list) {
  const std::set<T> distinct(list.begin(), list.end());
  if (distinct.size() != list.size()) Fail(2, flag + ": '" + text + "' has something twice");
  return list;
}

std::vector<int> Numbers(const std::string& flag, const std::string& text, int most) {
  std::vector<int> numbers;
  for (const std::string& part : Split(text)) numbers.push_back(Number(flag, part, most));
  return Distinct(flag, text, numbers);
}

std::vector<std::string> Names(const std::string& flag, const std::string& text,
                               const std::vector<std::string>& known) {
  std::vector<std::string> names = Split(text);
  for (const std::string& name : names) {
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    std::string list;
    for (const std::string& one : known) list += (list.empty() ? "" : ", ") + one;
    Fail(2, flag + ": '" + name + "' is none of " + list);
  }
  return Distinct(flag, text, names);
}

std::vector<std::string> Presets(const std::string& flag, const std::string& text) {
  std::vector<std::string> names = Split(text);
  for (const std::string& name : names) {
    sparkv_config config{};
    config.struct_size = sizeof(config);
    sparkv_error error{};
    if (name.empty()) Fail(2, flag + ": an empty name");
    if (sparkv_config_preset(&config, name.c_str(), &error) != SPARKV_OK)
      Fail(2, flag + ": " + error.text);
  }
  return Distinct(flag, text, names);
}

std::vector<std::string> SimdOfThisCpu() {
  std::vector<std::string> names;
  for (const sparkv_simd simd : {SPARKV_SIMD_PLAIN, SPARKV_SIMD_AVX2, SPARKV_SIMD_AVX512,
                                 SPARKV_SIMD_AMX, SPARKV_SIMD_NEON}) {
    if (const OpTable* ops = CpuOps(simd)) names.push_back(ops->name);
  }
  return names;
}

}  // namespace

Options ParseOptions(int argc, char** argv) {
  Options o;
  const std::vector<std::string> simd = SimdOfThisCpu();
  o.simd = {CpuOps(SPARKV_SIMD_AUTO)->name};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    if (equals == arg.npos)
      Fail(2, "'" + arg + "' is unknown or lacks its =value (--help lists what there is)");
    const std::string flag = arg.substr(0, equals), text = arg.substr(equals + 1);
    if (flag == "--what") {
      o.what = Names(flag, text, Options().what);
    } else if (flag == "--presets") {
      o.presets = Presets(flag, text);
    } else if (flag == "--simd") {
      if (text != "auto") o.simd = text == "all" ? simd : Names(flag, text, simd);
    } else if (flag == "--streams") {
      o.streams = Names(flag, text, {"split", "unified", "interleaved"});
    } else if (flag == "--tokens") {
      o.tokens = Numbers(flag, text, 1 << 20);
    } else if (flag == "--threads") {
      o.threads = Numbers(flag, text, 256);
    } else if (flag == "--sequences") {
      o.sequences = Numbers(flag, text, 256);
    } else if (flag == "--queries") {
      o.queries = Number(flag, text, 1 << 16);
    } else if (flag == "--dim") {
      o.shape.dim = Number(flag, text, 512);
      if (!HeadDimAllowed(o.shape.dim))
        Fail(2, flag + ": " + text + " is outside 32..512 in steps of 8");
    } else if (flag == "--kv-heads") {
      o.shape.kv_heads = Number(flag, text, 1024);
    } else if (flag == "--group") {
      o.shape.group = Number(flag, text, 1024);
    } else if (flag == "--out") {
      // Before the hour of measuring, not after it.
      if (!std::ofstream(text, std::ios::app)) Fail(2, flag + ": cannot write '" + text + "'");
      o.out = text;
    } else {
      Fail(2, "'" + flag + "' is unknown (--help lists what there is)");
    }
  }
  return o;
}

void PrintHelp() {
  std::cout <<
      R"(attend_bench: kernels alone, beside ggml's where it was built. Lists make every combination a row.
  --what=decode,prefill,seal,append   decode: a token per sequence attends; prefill: --queries tokens
                                      attend to all that is cached, none of them new; seal:
                                      --queries rows pass all stages and are packed; append: 1 and
                                      --queries rows are written
  --tokens=8192      cached per sequence (list)
  --threads=1        (list)
  --sequences=1      that decode together (list)
  --streams=split,unified   a stream per sequence; one stream and a mask, sequences behind each
                      other or token by token (interleaved)
  --presets=exact,balanced,spark-0.5,spark-0.5-i8,spark-0.5-i5,spark-0.8-i4
  --simd=auto        list; all: every one that this CPU has
  --queries=512 --dim=64 --kv-heads=3 --group=3
  --out=file.json    the table for scripts
Google Benchmark's own, among others: --benchmark_filter=regex, --benchmark_repetitions=9
)";
}

}  // namespace sparkv::bench

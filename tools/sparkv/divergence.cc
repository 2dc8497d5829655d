#include "divergence.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "heads.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::pair<const char*, const char*> kFields[] = {
    {"Mean PPL(Q) ", "perplexity"}, {"Mean PPL(Q)/PPL(base)", "perplexity_ratio"},
    {"Mean    KLD", "mean_kld"},    {"Median  KLD", "median_kld"},
    {"99.0%   KLD", "kld_99"},      {"Same top p", "top1_agreement"}};

std::string RequantizedModel(const std::string& model) {
  const char* home = getenv("HOME");
  const char* given = getenv("XDG_CACHE_HOME");
  const fs::path folder =
      (given && *given ? fs::path(given) : fs::path(home ? home : "/tmp") / ".cache") / "sparkv";
  std::error_code failed;
  fs::create_directories(folder, failed);
  if (failed) throw Error(kRuntime, fmt::format("{}: {}", folder.string(), failed.message()));
  const auto written = fs::last_write_time(model).time_since_epoch().count();
  const fs::path target =
      folder / fmt::format("{}-{}-{:x}-f32.gguf", fs::path(model).stem().string(),
                           fs::file_size(model), written);
  if (fs::exists(target)) return target;
  Note(fmt::format("writing F32 weights to {}", target.string()));
  // Of this process alone: two runs may need the same weights at once.
  const fs::path partial = fmt::format("{}.{}.partial", target.string(), getpid());
  Command command{FindProgram("llama-quantize"),
                  {"--allow-requantize", model, partial, "F32"},
                  ChildEnvironment(MakeCache("f16", {}), false)};
  Progress progress("llama-quantize");
  try {
    RunToEnd(
        command,
        [&](const std::string& line) {
          if (!line.empty()) progress.Update(line.substr(0, 70));
        },
        nullptr);
  } catch (const Error&) {
    fs::remove(partial, failed);
    throw;
  }
  fs::rename(partial, target, failed);
  if (failed) throw Error(kRuntime, fmt::format("{}: {}", target.string(), failed.message()));
  return target;
}

// The first number after `label` in a line that starts with it.
std::optional<double> NumberAfter(const std::string& line, const std::string& label) {
  if (line.rfind(label, 0) != 0) return std::nullopt;
  const size_t colon = line.find(':');
  if (colon == std::string::npos) return std::nullopt;
  return strtod(line.c_str() + colon + 1, nullptr);
}

constexpr size_t kPictureTokens = 512;

std::string PictureFile(const TemporaryFolder& folder) { return folder.File("saliency.json"); }
std::string StatsFile(const Cache& cache, const TemporaryFolder& folder) {
  return folder.File(cache.name + ".json");
}

// One reading of the text: without "--kl-divergence" among `flags` it writes the base, with it the
// reading is judged against that base.
Json ReadText(const Reading& reading, const Cache& cache, const std::string& label,
              const std::vector<std::string>& flags, const TemporaryFolder& folder) {
  std::vector<std::string> args = {
      "-m", reading.model, "-f", folder.File("text.txt"), "-c", fmt::format("{}", reading.context)};
  Reading cut = reading;
  if (reading.alone_every > 0) {
    // llama.cpp cuts batches into micro-batches: the last token of a batch is left over.
    cut.batch = reading.alone_every;
    cut.ubatch = std::max(1, reading.alone_every - 1);
  }
  const auto sizes = cut.SizeFlags();
  args.insert(args.end(), sizes.begin(), sizes.end());
  args.insert(args.end(), {"--chunks", fmt::format("{}", reading.chunks), "--kl-divergence-base",
                           folder.File("base.kld")});
  args.insert(args.end(), flags.begin(), flags.end());
  Command command = MakeCommand("llama-perplexity", cache, args);
  if (cache.packed) command.environment.push_back("SPARKV_STATS=" + StatsFile(cache, folder));
  if (cache.packed && reading.heads) {
    const size_t layers = ReadModelShape(reading.model).layers.size();
    command.environment.push_back("SPARKV_ERRORS=1");
    command.environment.push_back(
        fmt::format("SPARKV_SALIENCY={}:{}:0", PictureFile(folder), layers / 2));
  }

  Json result = Json::object();
  Progress progress(label);
  progress.Update("reading the text");
  RunToEnd(
      command,
      [&](const std::string& line) {
        for (const auto& [label, field] : kFields) {
          if (const auto number = NumberAfter(line, label)) result[field] = *number + 0.0;  // no -0
        }
        if (const int chunk = line.rfind("  ", 0) == 0 ? atoi(line.c_str()) : 0; chunk > 0) {
          progress.Update(fmt::format("chunk {}", chunk));
        }
      },
      nullptr);
  return result;
}

}  // namespace

std::vector<std::string> Reading::SizeFlags() const {
  std::vector<std::string> flags = {"-b", fmt::format("{}", batch), "-ub",
                                    fmt::format("{}", ubatch)};
  if (threads > 0) flags.insert(flags.end(), {"-t", fmt::format("{}", threads)});
  return flags;
}

std::string WeightsName(const ModelShape& shape, bool requantize) {
  if (!shape.Quantised()) return "unquantised";
  return requantize ? "requantised to F32" : "quantised";
}

void ChooseWeights(const ModelShape& shape, bool requantize, std::string* model) {
  if (!shape.Quantised()) return;
  if (requantize) {
    *model = RequantizedModel(*model);
    return;
  }
  Note(
      "the weights are quantised: equally valid runs differ, see the noise floor; "
      "--requantize-f32 removes it");
}

void LetHeadsEvict(const std::vector<Cache>& caches, Reading* reading) {
  for (const Cache& cache : caches) {
    if (!cache.Evicts()) continue;
    const int every = reading->alone_every = reading->ubatch;
    const int first = (cache.config.evict_tokens / every + 1) * every;
    if (first <= reading->context / 2) continue;
    Note(
        fmt::format("{}: heads evict from token {} on, those from {} to {} are scored; -c is small",
                    cache.name, first, reading->context / 2, reading->context));
  }
}

void WriteBase(const Reading& reading, const TemporaryFolder& folder) {
  ReadText(reading, MakeCache("f32", {}), "base, f32 cache", {"-fa", "off"}, folder);
}

Json Judge(const Reading& reading, const Cache& cache, const std::string& label,
           const TemporaryFolder& folder, const std::vector<std::string>& flags) {
  std::vector<std::string> all = {"--kl-divergence"};
  all.insert(all.end(), flags.begin(), flags.end());
  Json result = ReadText(reading, cache, label, all, folder);
  for (const auto& [found, field] : kFields) {
    if (result.contains(field)) continue;
    throw Error(kRuntime,
                fmt::format("llama-perplexity: no '{}' in its output ({}); is the text longer than "
                            "2 x {} tokens?",
                            found, cache.name, reading.context));
  }
  result["top1_agreement"] = result["top1_agreement"].get<double>() / 100;
  result["bits_per_element"] = HostBits(cache.name);
  if (!cache.packed) return result;
  const std::string stats = StatsFile(cache, folder);
  const Json measured = Json::parse(ReadFile(stats), nullptr, false);
  if (!measured.is_object()) throw Error(kRuntime, fmt::format("{}: not a JSON object", stats));
  fs::remove(stats);  // the next cache may have the same name
  for (const char* field : {"bits_per_element", "keys_bits_per_element", "values_bits_per_element",
                            "resident_bytes", "peak_bytes", "config"}) {
    result[field] = measured.value(field, Json());
  }
  if (!reading.heads) return result;
  result["errors"] = ErrorsOfStats(measured);
  result["saliency"] = nullptr;  // layers of another kind have none
  if (fs::exists(PictureFile(folder))) {
    result["saliency"] =
        FirstTokens(Json::parse(ReadFile(PictureFile(folder)), nullptr, false), kPictureTokens);
    fs::remove(PictureFile(folder));
  }
  return result;
}

}  // namespace sparkv

#include "fit.h"

#include <fmt/format.h>

#include <charconv>
#include <memory>
#include <string_view>

#include "kv_bytes.h"
#include "launch.h"
#include "report.h"

namespace sparkv {
namespace {

using Json = nlohmann::json;

constexpr int64_t kStep = 256;  // llama.cpp rounds a context up to a multiple of this
// A token of a layer without a window takes more than a byte in every cache. What fits at this many
// tokens into at most as many bytes therefore keeps windows only, and fits at any context.
constexpr int64_t kMost = int64_t{1} << 50;

struct Settings {
  KvOptions kv;
  std::string model, memory;
  bool json = false;
};

// "4GiB", "1.5 GB", "1048576"; from_chars, because strtod also takes a locale's comma and blanks.
int64_t ParseMemory(const std::string& text) {
  struct Unit {
    const char* name;
    double bytes;
  };
  static constexpr Unit kUnits[] = {{"", 1},     {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
                                    {"KB", 1e3}, {"MB", 1e6},     {"GB", 1e9}};
  double number = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number, std::chars_format::fixed);
  std::string_view name(parsed.ptr, end - parsed.ptr);
  if (name.size() > 1 && name[0] == ' ') name.remove_prefix(1);
  for (const Unit& unit : kUnits) {
    if (parsed.ec == std::errc::invalid_argument || name != unit.name) continue;
    const double bytes = number * unit.bytes;
    if (parsed.ec == std::errc() && bytes >= 1 && bytes <= kMost)  // false for NaN
      return static_cast<int64_t>(bytes);
    throw Error(kUsage,
                fmt::format("--memory: '{}' is outside 1 byte to 1048576 GiB", Printable(text)));
  }
  throw Error(kUsage, fmt::format("--memory: '{}' is not a size such as 1048576, 4GiB or 1.5 GB "
                                  "(KiB, MiB, GiB, KB, MB, GB)",
                                  Printable(text)));
}

// The last multiple of kStep that fits; 0: not even the first does; kMost: any context fits.
int64_t LongestContext(const Cache& cache, const ModelShape& model, int64_t memory) {
  int64_t fits = 0, over = kMost / kStep + 1;
  while (over - fits > 1) {
    const int64_t steps = fits + (over - fits) / 2;
    (PredictedBytes(cache, model, steps * kStep) <= memory ? fits : over) = steps;
  }
  return fits * kStep;
}

Json Row(const Cache& cache, const ModelShape& model, int64_t context, int64_t f16) {
  const bool any = context == kMost;
  Json row = {{"cache", cache.name},
              {"any_context", any},
              {"context", any ? Json() : Json(context)},
              {"bits_per_element", nullptr},
              {"times_f16", nullptr},
              {"times_trained", nullptr}};
  if (context > 0) {
    row["bits_per_element"] = 8 * PredictedBytes(cache, model, context) / Elements(model, context);
  }
  if (context == 0 || any) return row;
  if (f16 > 0 && f16 < kMost) row["times_f16"] = double(context) / f16;
  if (model.context_length > 0) row["times_trained"] = double(context) / model.context_length;
  return row;
}

void PrintTable(const Json& report) {
  const int trained = report["model"]["context_length"].get<int>();
  fmt::print(
      "{}: longest context whose KV cache fits into {} bytes\n"
      "(for the KV cache alone: weights, work buffers and page slack are not counted)\n\n",
      report["model"]["path"].get<std::string>(), report["memory_bytes"].get<int64_t>());
  const auto number = [](const Json& value) {
    return value.is_null() ? "-" : fmt::format("{:.2f}", value.get<double>());
  };
  Table table({"cache", "bits/element", "tokens", "x f16", "x trained"});
  bool longer = false;
  for (const auto& row : report["caches"]) {
    const Json& context = row["context"];
    table.Add({row["cache"], number(row["bits_per_element"]),
               context.is_null() ? "any"
               : context == 0    ? fmt::format("less than {}", kStep)
                                 : fmt::format("{}", context.get<int64_t>()),
               number(row["times_f16"]), number(row["times_trained"])});
    longer |= context.is_null() || context > trained;
  }
  table.Print();
  if (longer && trained > 0)
    fmt::print("\nThe model was trained for {} tokens: more fit, but it may not use them well\n",
               trained);
}

int Fit(Settings settings) {
  if (settings.kv.preset.empty()) settings.kv.preset = "exact,safe,balanced,small";
  const int64_t memory = ParseMemory(settings.memory);
  if (const auto budget = settings.kv.values.find("budget"); budget != settings.kv.values.end()) {
    throw Error(kUsage, fmt::format("--kv-budget: {}: fit asks what presets take; a budget takes "
                                    "what it is given",
                                    budget->second));
  }
  std::vector<Cache> caches = MakeCaches("f16,q8_0,q4_0", settings.kv);
  RequireModel(settings.model);
  const ModelShape model = ReadCachedModelShape(settings.model);
  for (Cache& cache : caches) {
    CheckCalibration(cache, model);
    cache.config.budget[0] = '\0';  // a calibration spends the same bytes, elsewhere
  }
  Json report = {{"model",
                  {{"path", settings.model},
                   {"architecture", model.architecture},
                   {"context_length", model.context_length}}},
                 {"memory_bytes", memory},
                 {"caches", Json::array()}};
  NoteEvictions(caches);
  const int64_t f16 = LongestContext(caches[0], model, memory);
  for (const Cache& cache : caches)
    report["caches"].push_back(Row(cache, model, LongestContext(cache, model, memory), f16));
  if (settings.json) {
    PrintJson(report);
  } else {
    PrintTable(report);
  }
  return kOk;
}

}  // namespace

std::function<int()> AddFit(CLI::App* app) {
  auto settings = std::make_shared<Settings>();
  settings->model = DefaultModel();
  app->add_option("-m,--model", settings->model, "GGUF file; only its metadata is read");
  app->add_option("--memory", settings->memory,
                  "for the KV cache alone: bytes, or a number and KiB, MiB, GiB, KB, MB or GB")
      ->required();
  app->add_flag("--json", settings->json, "JSON on stdout");
  AddKvOptions(app, &settings->kv);
  app->footer(
      "--kv-preset takes a list here; without it: exact, safe, balanced, small. Contexts are "
      "those of one\n"
      "sequence, in multiples of 256 tokens, as llama.cpp makes them. In JSON a context is 0 where "
      "not even 256\n"
      "tokens fit, and null where any number does (any_context), as all layers are windowed.\n\n"
      "Examples\n"
      "  sparkv fit -m model.gguf --memory 4GiB\n"
      "  sparkv fit -m model.gguf --memory '1.5 GB' --kv-preset spark-0.8,spark-0.5-i4 --json");
  return [=] { return Fit(*settings); };
}

}  // namespace sparkv

#include "config/config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <span>
#include <vector>

#include "config/baseline_name.h"
#include "config/layers.h"
#include "config/parse.h"
#include "config/recent.h"

namespace sparkv {
namespace {

// What a preset starts from. Paper: channels kept as f16, as published. Packed: kept as integers;
// its recovery and group are free to differ from the paper where measurements say so
// (docs/results.md).
struct Start {
  sparkv_recover recover;
  sparkv_group group;
  int window;
};
constexpr Start kPaper = {SPARKV_RECOVER_MEAN, SPARKV_GROUP_SIGNED, 32};
// The newest tokens are read most: 64 more dense ones take 0.18 bits at 4,096 tokens and a third of
// the divergence away.
constexpr Start kPacked = {SPARKV_RECOVER_MEAN, SPARKV_GROUP_SIGNED, 96};
constexpr int kSinks = 4, kObserve = 32;

// The first name of a number is the one written; the others are read as well.
struct Name {
  std::string_view text;
  int32_t number;
};
constexpr Name kRecoverNames[] = {
    {"zero", SPARKV_RECOVER_ZERO}, {"mean", SPARKV_RECOVER_MEAN}, {"paper", SPARKV_RECOVER_PAPER}};
constexpr Name kGroupNames[] = {{"signed", SPARKV_GROUP_SIGNED}, {"energy", SPARKV_GROUP_ENERGY}};
constexpr Name kKeptNames[] = {
    {"f16", SPARKV_F16},          {"i8", SPARKV_INT8},          {"i6", SPARKV_INT6},
    {"i5", SPARKV_INT5},          {"i4", SPARKV_INT4},          {"int8", SPARKV_INT8},
    {"int6", SPARKV_INT6},        {"int5", SPARKV_INT5},        {"int4", SPARKV_INT4},
    {"t7543", SPARKV_TIERS_7543}, {"t7432", SPARKV_TIERS_7432}, {"t6321", SPARKV_TIERS_6321},
    {"t5321", SPARKV_TIERS_5321}, {"t4210", SPARKV_TIERS_4210}};
constexpr Name kValuesNames[] = {
    {"f16", SPARKV_F16},     {"q8", SPARKV_INT8},     {"q4", SPARKV_INT4},
    {"t4", SPARKV_TRELLIS4}, {"t3", SPARKV_TRELLIS3}, {"t2", SPARKV_TRELLIS2},
    {"t1", SPARKV_TRELLIS1}, {"i8", SPARKV_INT8},     {"i4", SPARKV_INT4},
    {"int8", SPARKV_INT8},   {"int4", SPARKV_INT4}};
constexpr Name kSealNames[] = {{"stream", SPARKV_SEAL_STREAM},
                               {"prefill-end", SPARKV_SEAL_PREFILL_END}};
constexpr Name kSimdNames[] = {{"auto", SPARKV_SIMD_AUTO}, {"plain", SPARKV_SIMD_PLAIN},
                               {"avx2", SPARKV_SIMD_AVX2}, {"avx512", SPARKV_SIMD_AVX512},
                               {"amx", SPARKV_SIMD_AMX},   {"neon", SPARKV_SIMD_NEON}};

constexpr Name kEvictNames[] = {
    {"none", SPARKV_EVICT_NONE},           {"streamingllm", SPARKV_EVICT_STREAMINGLLM},
    {"tova", SPARKV_EVICT_TOVA},           {"knorm", SPARKV_EVICT_KNORM},
    {"keydiff", SPARKV_EVICT_KEYDIFF},     {"snapkv", SPARKV_EVICT_SNAPKV},
    {"pyramidkv", SPARKV_EVICT_PYRAMIDKV}, {"expected", SPARKV_EVICT_EXPECTED}};
constexpr int32_t kMostEvictTokens = 1 << 24;

struct EnumField {
  std::string_view key;
  int32_t sparkv_config::*field;
  std::span<const Name> names;
};
constexpr EnumField kEnumFields[] = {{"recover", &sparkv_config::recover, kRecoverNames},
                                     {"group", &sparkv_config::group, kGroupNames},
                                     {"kept", &sparkv_config::kept, kKeptNames},
                                     {"values", &sparkv_config::values, kValuesNames},
                                     {"seal", &sparkv_config::seal, kSealNames},
                                     {"simd", &sparkv_config::simd, kSimdNames}};

struct CountField {
  std::string_view key;
  int32_t sparkv_config::*field;
  int32_t low, high;
};
constexpr CountField kCountFields[] = {{"sinks", &sparkv_config::sinks, 0, 1024},
                                       {"window", &sparkv_config::window, 0, 65536},
                                       {"observe", &sparkv_config::observe, 1, 1024},
                                       {"threads", &sparkv_config::threads, 0, 256}};
constexpr CountField kProtectFields[] = {{"protect first", &sparkv_config::protect_first, 0, 9999},
                                         {"protect last", &sparkv_config::protect_last, 0, 9999}};

std::string_view NameOf(std::span<const Name> names, int32_t number) {
  for (const Name& name : names) {
    if (name.number == number) return name.text;
  }
  return "?";
}

std::string NameList(std::span<const Name> names) {
  std::string list;
  for (const Name& name : names) {
    if (name.text != NameOf(names, name.number)) continue;
    list += (list.empty() ? "" : ", ") + std::string(name.text);
  }
  return list;
}

// Shortest text that reads back as the same number.
std::string NumberText(double number, std::chars_format format = std::chars_format::general) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof(text), number, format);
  return error == std::errc() ? std::string(text, end) : std::string();
}

bool RatioAllowed(double ratio) { return ratio >= 0.0 && ratio <= 1.0; }

bool Tiered(int32_t kept) { return kept >= SPARKV_TIERS_7543 && kept <= SPARKV_TIERS_4210; }

Start StartOf(int32_t kept) { return kept == SPARKV_F16 ? kPaper : kPacked; }

// Chosen by what they lose for their bytes at 4,096 tokens (docs/results.md). Stages of many rows,
// with the one on its way to the next store, fill whole groups of slots (cache/dense_store.h).
struct Chosen {
  std::string_view name, rows;
  int32_t window;
  std::string_view recent, layers;
};
constexpr Chosen kChosen[] = {
    {"safe", "tiers-7543", 64, "479:i8+q8", ""},
    {"balanced", "tiers-5321", 32, "831:t7543+t4", "middle=tiers-6321"},
    {"small", "tiers-4210", 32, "271:t7543+t4,1391:t5321+t2", "middle=tiers-6321"},
    {"tiny", "tiers-4210", 8, "127:t7543+t4,607:t5321+t2", ""}};

const Chosen* ChosenOf(const sparkv_config& config) {
  const auto* found = std::find_if(std::begin(kChosen), std::end(kChosen), [&](const Chosen& c) {
    return c.name == TextOf(config.preset);
  });
  return found == std::end(kChosen) ? nullptr : found;
}

// What is said of all rows holds for those that the preset gives layers of their own, too.
void ForgetLayersOfPreset(sparkv_config* config) {
  const Chosen* chosen = ChosenOf(*config);
  if (chosen != nullptr && TextOf(config->layers) == chosen->layers)
    std::memset(config->layers, 0, sizeof(config->layers));
}

Status SetRatio(std::string_view value, sparkv_config* config) {
  double ratio = 0.0;
  const Parse parse = ParseNumber(value, &ratio, std::chars_format::general);
  if (parse == Parse::kNotANumber)
    return Status::Invalid("ratio: " + Quote(value) + " is not a number");
  if (parse == Parse::kOutOfRange || !RatioAllowed(ratio)) {
    return Status::Invalid(Outside("ratio", value.substr(0, 64), "0", "1"));
  }
  config->ratio = ratio + 0.0;  // -0 becomes 0
  ForgetLayersOfPreset(config);
  return Status::Ok();
}

// Window and stages of a named preset, and its middle. Heads that keep fewer tokens than it was
// chosen at have them in proportion, else what is recent would be most of what they keep; but
// twice, since what they keep is read more than what they evict. The middle's bytes go to the
// stages there.
struct Ages {
  int32_t window;
  std::string recent;
  std::string_view layers;
};
constexpr int32_t kChosenTokens = 4096, kSlots = 4;

Ages AgesOf(const Chosen& chosen, const sparkv_config& config) {
  if (config.evict == SPARKV_EVICT_NONE || config.evict_tokens >= kChosenTokens)
    return {chosen.window, std::string(chosen.recent), chosen.layers};
  int32_t n_stores = 1;
  const int64_t tenths = chosen.layers.empty() ? 20 : 23;
  const auto share = [&](int32_t age) {
    const int64_t all = int64_t{10} * kChosenTokens * kSlots;
    const int64_t groups = (tenths * age * config.evict_tokens + all / 2) / all;
    return int32_t(std::max<int64_t>(groups, 1)) * kSlots - n_stores;
  };
  Ages ages{std::min(share(chosen.window), chosen.window), "", ""};
  std::vector<RecentStage> stages;
  if (!ParseRecent(chosen.recent, &stages).ok()) return ages;
  int32_t last = ages.window;
  for (const RecentStage& stage : stages) {
    const int32_t until = std::min(share(stage.until) - 1, stage.until);
    if (until <= last) continue;
    last = until;
    ++n_stores;
    ages.recent += (ages.recent.empty() ? "" : ",") + std::to_string(until) + ":" +
                   std::string(NameOf(kKeptNames, stage.kept)) + "+" +
                   std::string(NameOf(kValuesNames, stage.values));
  }
  return ages;
}

// "snapkv:512", "none". What is still the preset's follows: window, stages, middle.
Status SetEvict(std::string_view value, sparkv_config* config) {
  const size_t colon = std::min(value.find(':'), value.size());
  const auto* found = std::find_if(std::begin(kEvictNames), std::end(kEvictNames),
                                   [&](const Name& n) { return n.text == value.substr(0, colon); });
  if (found == std::end(kEvictNames)) {
    return Status::Invalid("evict: " + Quote(value) + " is unknown (" + NameList(kEvictNames) +
                           ", each but none with tokens: snapkv:512)");
  }
  int32_t tokens = 0;
  if (found->number == SPARKV_EVICT_NONE) {
    if (colon != value.size()) return Status::Invalid("evict: none takes no tokens");
  } else {
    const std::string_view text = value.substr(std::min(colon + 1, value.size()));
    const Parse parse = ParseNumber(text, &tokens);
    if (parse == Parse::kNotANumber)
      return Status::Invalid("evict: " + Quote(value) + " names no tokens, as in snapkv:512");
    if (parse == Parse::kOutOfRange || tokens < 1 || tokens > kMostEvictTokens)
      return Status::Invalid(Outside("evict", text.substr(0, 64), "1", "2^24"));
  }
  const Chosen* chosen = ChosenOf(*config);
  sparkv_config next = *config;
  next.evict = found->number;
  next.evict_tokens = tokens;
  if (chosen != nullptr) {
    const Ages before = AgesOf(*chosen, *config), after = AgesOf(*chosen, next);
    if (config->window == before.window) next.window = after.window;
    if (TextOf(config->recent) == before.recent) {
      if (Status s = SetRecent(after.recent, &next); !s.ok()) return s;
    }
    if (TextOf(config->layers) == before.layers) {
      if (Status s = SetLayers(after.layers, &next); !s.ok()) return s;
    }
  }
  *config = next;
  return Status::Ok();
}

Status CheckEvict(const sparkv_config& config) {
  if (NameOf(kEvictNames, config.evict) == "?") {
    return Status::Invalid("evict: " + std::to_string(config.evict) + " is unknown (" +
                           NameList(kEvictNames) + ")");
  }
  if (config.evict == SPARKV_EVICT_NONE) return Status::Ok();
  if (config.evict_tokens > kMostEvictTokens)
    return Status::Invalid(Outside("evict", std::to_string(config.evict_tokens), "1", "2^24"));
  if (config.evict_tokens <= config.sinks + config.window) {
    return Status::Invalid("evict: " + std::to_string(config.evict_tokens) +
                           " tokens are not above sinks " + std::to_string(config.sinks) +
                           " and window " + std::to_string(config.window));
  }
  return Status::Ok();
}

Status UnknownPreset(std::string_view name, std::string_view why) {
  return Status::Invalid("preset: " + Quote(name) + " " + std::string(why) +
                         " (safe, balanced, small, tiny, exact, spark-0.5, spark-0.8, "
                         "spark-0.5-i5, ..., tiers-7543, ...)");
}

}  // namespace

std::string Quote(std::string_view text) {
  constexpr size_t kLongest = 61;
  std::string quoted = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    quoted += byte < 0x20 || byte == 0x7f ? '?' : c;
  }
  if (text.size() > kLongest) quoted += "...";
  return quoted + "\"";
}

Status SetPreset(std::string_view name, sparkv_config* config) {
  if (name.empty()) name = kDefaultPreset;
  for (const Chosen& chosen : kChosen) {
    if (name != chosen.name) continue;
    if (Status s = SetPreset(chosen.rows, config); !s.ok()) return s;
    config->window = chosen.window;
    std::memset(config->preset, 0, sizeof(config->preset));
    std::memcpy(config->preset, name.data(), name.size());
    if (Status s = SetLayers(chosen.layers, config); !s.ok()) return s;
    return SetRecent(chosen.recent, config);
  }
  sparkv_config next = {};
  next.struct_size = config->struct_size;
  next.kept = next.values = SPARKV_F16;
  next.seal = SPARKV_SEAL_STREAM;
  next.simd = SPARKV_SIMD_AUTO;
  next.sinks = kSinks;
  next.observe = kObserve;
  std::string full_name(name);

  if (constexpr std::string_view kPrefix = "tiers-"; name.starts_with(kPrefix)) {
    const std::string kept = "t" + std::string(name.substr(kPrefix.size()));
    for (const Name& known : kKeptNames) {
      if (Tiered(known.number) && known.text == kept) next.kept = known.number;
    }
    if (next.kept == SPARKV_F16) return UnknownPreset(name, "is unknown");
    // Bits of values that cost about as much loss as the keys' do (docs/results.md).
    next.values = next.kept == SPARKV_TIERS_4210   ? SPARKV_TRELLIS1
                  : next.kept == SPARKV_TIERS_5321 ? SPARKV_TRELLIS2
                  : next.kept == SPARKV_TIERS_6321 ? SPARKV_TRELLIS3
                                                   : SPARKV_TRELLIS4;
  } else if (name != "exact") {
    constexpr std::string_view kPrefix = "spark-";
    if (!name.starts_with(kPrefix)) return UnknownPreset(name, "is unknown");
    std::string_view ratio_text = name.substr(kPrefix.size());
    std::string_view number_text;
    if (const size_t dash = ratio_text.find("-i"); dash != std::string_view::npos) {
      number_text = ratio_text.substr(dash + 1);
      ratio_text = ratio_text.substr(0, dash);
      bool known = false;
      for (const Name& kept : kKeptNames) {
        if (kept.text == number_text && !Tiered(kept.number)) {
          next.kept = kept.number;
          known = true;
        }
      }
      if (!known) return UnknownPreset(name, "is unknown: the kept type is one of i8, i6, i5, i4");
      // Keys dominate the loss down to 6 bits; only beside 8-bit keys 8-bit values show.
      next.values = next.kept == SPARKV_INT8 ? SPARKV_INT8 : SPARKV_INT4;
      number_text = NameOf(kKeptNames, next.kept);
    }
    double ratio = 0.0;
    const Parse parse = ParseNumber(ratio_text, &ratio, std::chars_format::fixed);
    if (parse == Parse::kNotANumber) return UnknownPreset(name, "is unknown");
    if (parse == Parse::kOutOfRange || !RatioAllowed(ratio)) {
      return Status::Invalid("preset: " + Quote(name) + " has a ratio outside [0, 1]");
    }
    next.ratio = ratio + 0.0;
    const std::string short_ratio = NumberText(next.ratio, std::chars_format::fixed);
    full_name = std::string(kPrefix) + short_ratio;
    if (!number_text.empty()) full_name += "-" + std::string(number_text);
    if (short_ratio.empty() || full_name.size() >= sizeof(next.preset)) {
      return Status::Invalid("preset: " + Quote(name) + " has too many digits");
    }
  }
  const Start start = StartOf(next.kept);
  next.recover = start.recover;
  next.window = start.window;
  next.group = start.group;
  std::memcpy(next.preset, full_name.c_str(), full_name.size() + 1);
  *config = next;
  return Status::Ok();
}

Status SetParameter(std::string_view key, std::string_view value, sparkv_config* config) {
  if (key == "ratio") return SetRatio(value, config);
  if (key == "layers") return SetLayers(value, config);
  if (key == "protect") return SetProtect(value, config);
  if (key == "budget") return SetBudget(value, config);
  if (key == "sensitivity") return SetSensitivity(value, config);
  if (key == "recent") return SetRecent(value, config);
  if (key == "evict") return SetEvict(value, config);
  if (key == "baseline") return SetBaseline(value, config);
  for (const EnumField& field : kEnumFields) {
    if (key != field.key) continue;
    for (const Name& name : field.names) {
      if (name.text != value) continue;
      config->*field.field = name.number;
      if (key == "kept" || key == "values") ForgetLayersOfPreset(config);
      return Status::Ok();
    }
    return Status::Invalid(std::string(key) + ": " + Quote(value) + " is unknown (" +
                           NameList(field.names) + ")");
  }
  for (const CountField& field : kCountFields) {
    if (key != field.key) continue;
    int32_t count = 0;
    const Parse parse = ParseNumber(value, &count);
    if (parse == Parse::kNotANumber)
      return Status::Invalid(std::string(key) + ": " + Quote(value) + " is not a whole number");
    if (parse == Parse::kOutOfRange || count < field.low || count > field.high) {
      return Status::Invalid(
          Outside(key, value.substr(0, 64), std::to_string(field.low), std::to_string(field.high)));
    }
    config->*field.field = count;
    return Status::Ok();
  }
  std::string known = "ratio, layers, protect, budget, sensitivity, recent, evict, baseline";
  for (const EnumField& field : kEnumFields) known += ", " + std::string(field.key);
  for (const CountField& field : kCountFields) known += ", " + std::string(field.key);
  return Status::Invalid("parameter: " + Quote(key) + " is unknown (" + known + ")");
}

Status CheckConfig(const sparkv_config& config) {
  if (config.struct_size < sizeof(config)) {
    return Status::Invalid("config.struct_size: " + std::to_string(config.struct_size) +
                           " is less than " + std::to_string(sizeof(config)));
  }
  if (!RatioAllowed(config.ratio))
    return Status::Invalid(Outside("ratio", NumberText(config.ratio), "0", "1"));
  for (const EnumField& field : kEnumFields) {
    if (NameOf(field.names, config.*field.field) == "?") {
      return Status::Invalid(std::string(field.key) + ": " + std::to_string(config.*field.field) +
                             " is unknown (" + NameList(field.names) + ")");
    }
  }
  for (const std::span<const CountField> fields :
       {std::span<const CountField>(kCountFields), std::span<const CountField>(kProtectFields)}) {
    for (const CountField& field : fields) {
      const int32_t count = config.*field.field;
      if (count < field.low || count > field.high) {
        return Status::Invalid(Outside(field.key, std::to_string(count), std::to_string(field.low),
                                       std::to_string(field.high)));
      }
    }
  }
  if (Tiered(config.kept) && config.ratio != 0.0) {
    return Status::Invalid("ratio: " + NumberText(config.ratio) + ", but tiers (kept " +
                           std::string(NameOf(kKeptNames, config.kept)) +
                           ") prune nothing (presets spark-R-iB do)");
  }
  if (Status s = CheckEvict(config); !s.ok()) return s;
  if (Status s = CheckLayers(config); !s.ok()) return s;
  if (Status s = CheckRecent(config); !s.ok()) return s;
  return CheckBaseline(config);
}

std::string ConfigText(const sparkv_config& config) {
  std::string text(config.preset, strnlen(config.preset, sizeof(config.preset)));
  const auto add = [&text](std::string_view key, std::string_view value) {
    text += " " + std::string(key) + " " + std::string(value);
  };
  add("ratio", NumberText(config.ratio));
  add("recover", NameOf(kRecoverNames, config.recover));
  if (config.group != StartOf(config.kept).group) add("group", NameOf(kGroupNames, config.group));
  add("kept", NameOf(kKeptNames, config.kept));
  add("values", NameOf(kValuesNames, config.values));
  add("sinks", std::to_string(config.sinks));
  add("window", std::to_string(config.window));
  if (config.observe != kObserve) add("observe", std::to_string(config.observe));
  add("seal", NameOf(kSealNames, config.seal));
  if (config.simd != SPARKV_SIMD_AUTO) add("simd", NameOf(kSimdNames, config.simd));
  if (config.threads != 0) add("threads", std::to_string(config.threads));
  if (!TextOf(config.layers).empty()) add("layers", TextOf(config.layers));
  if (config.protect_first != 0 || config.protect_last != 0) {
    add("protect", "first:" + std::to_string(config.protect_first) +
                       ",last:" + std::to_string(config.protect_last));
  }
  if (!TextOf(config.budget).empty()) add("budget", TextOf(config.budget));
  if (!TextOf(config.sensitivity).empty()) add("sensitivity", TextOf(config.sensitivity));
  if (!TextOf(config.recent).empty()) add("recent", TextOf(config.recent));
  if (config.evict != SPARKV_EVICT_NONE) {
    add("evict",
        std::string(NameOf(kEvictNames, config.evict)) + ":" + std::to_string(config.evict_tokens));
  }
  if (!TextOf(config.baseline).empty()) add("baseline", TextOf(config.baseline));
  return text;
}

}  // namespace sparkv

#include "config/recent.h"

#include <algorithm>
#include <string>

#include "config/config.h"
#include "config/parse.h"

namespace sparkv {
namespace {

constexpr int32_t kMostUntil = 65536;

Status ParseStage(std::string_view text, RecentStage* stage) {
  const auto wrong = [&](const std::string& why) {
    return Status::Invalid("recent: " + Quote(text) + " " + why);
  };
  const size_t colon = text.find(':'), plus = text.find('+');
  if (colon == std::string_view::npos || plus == std::string_view::npos || plus < colon)
    return wrong("is not TOKENS:KEYS+VALUES, as in 256:i8+q8");
  const Parse parse = ParseNumber(text.substr(0, colon), &stage->until);
  if (parse == Parse::kNotANumber) return wrong("begins with no number of tokens");
  if (parse == Parse::kOutOfRange || stage->until < 1 || stage->until > kMostUntil)
    return wrong("has tokens outside [1, " + std::to_string(kMostUntil) + "]");
  sparkv_config rows = {};
  rows.struct_size = sizeof(rows);
  if (Status s = SetParameter("kept", text.substr(colon + 1, plus - colon - 1), &rows); !s.ok())
    return wrong("has keys of no known number (" + s.text + ")");
  if (Status s = SetParameter("values", text.substr(plus + 1), &rows); !s.ok())
    return wrong("has values of no known number (" + s.text + ")");
  stage->kept = sparkv_number(rows.kept);
  stage->values = sparkv_number(rows.values);
  if (stage->kept == SPARKV_F16 || stage->values == SPARKV_F16)
    return wrong("has f16 numbers: that is the window");
  return Status::Ok();
}

}  // namespace

Status ParseRecent(std::string_view value, std::vector<RecentStage>* stages) {
  stages->clear();
  const Status s = ForEachEntry(value, [&](std::string_view entry) -> Status {
    RecentStage stage{};
    if (Status s = ParseStage(entry, &stage); !s.ok()) return s;
    if (!stages->empty() && stage.until <= stages->back().until) {
      return Status::Invalid("recent: " + std::to_string(stage.until) + " tokens behind " +
                             std::to_string(stages->back().until));
    }
    if (stages->size() == kMaxRecentStages) {
      return Status::Invalid("recent: more than " + std::to_string(kMaxRecentStages) + " stages");
    }
    stages->push_back(stage);
    return Status::Ok();
  });
  if (!s.ok()) stages->clear();
  return s;
}

std::vector<RecentStage> RecentStages(const sparkv_config& config) {
  std::vector<RecentStage> stages;
  if (!ParseRecent(TextOf(config.recent), &stages).ok()) return {};
  std::erase_if(stages, [&](const RecentStage& s) {
    return s.until <= config.window ||
           (config.evict != SPARKV_EVICT_NONE && config.sinks + s.until >= config.evict_tokens);
  });
  return stages;
}

Status SetRecent(std::string_view value, sparkv_config* config) {
  if (value == "none") value = {};
  std::vector<RecentStage> stages;
  if (Status s = ParseRecent(value, &stages); !s.ok()) return s;
  return SetText("recent", value, &config->recent);
}

Status CheckRecent(const sparkv_config& config) {
  std::vector<RecentStage> stages;
  if (Status s = ParseRecent(TextOf(config.recent), &stages); !s.ok()) return s;
  if (stages.empty() || TextOf(config.baseline).empty()) return Status::Ok();
  return Status::Invalid("baseline: " + Quote(TextOf(config.baseline)) +
                         " goes with preset exact, not with recent " +
                         std::string(TextOf(config.recent)));
}

}  // namespace sparkv

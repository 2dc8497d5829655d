// Rows between the dense window and the packed store: the newer a row, the more its bits count.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "sparkv/sparkv.h"

namespace sparkv {

// Rows less than `until` tokens old that no stage before has: numbers of keys, none of them pruned,
// and of values.
struct RecentStage {
  int32_t until;
  sparkv_number kept, values;
};
inline constexpr size_t kMaxRecentStages = 3;

// "256:i8+q8,1024:t7432+t4": younger ones first; none when it fails.
Status ParseRecent(std::string_view value, std::vector<RecentStage>* stages);
// Those of a configuration that was checked which are older than its window and, where tokens are
// evicted, younger than what stays.
std::vector<RecentStage> RecentStages(const sparkv_config& config);
// The parameter recent of SetParameter, "none" for no stages, and its part of CheckConfig.
Status SetRecent(std::string_view value, sparkv_config* config);
Status CheckRecent(const sparkv_config& config);

}  // namespace sparkv

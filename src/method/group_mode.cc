#include "method/group_mode.h"

#include <algorithm>
#include <functional>

#include "method/saliency.h"
#include "method/select.h"

namespace sparkv {

int SelectGroup(const float* k, const float* u, int head_dim, uint8_t* mask) {
  float s[kMaxSelect], sorted[kMaxSelect];
  Contribution(k, u, head_dim, s);
  // A NaN contribution makes every sum NaN, nothing is above it, and the token falls into group 0.
  bool has_nan = false;
  for (int j = 0; j < head_dim; ++j) {
    has_nan |= s[j] != s[j];
    sorted[j] = s[j];
  }
  int first_above = 0;
  if (!has_nan) {
    std::sort(sorted, sorted + head_dim, std::greater<float>());
    double total = 0.0;
    for (int i = 0; i < head_dim; ++i) total += sorted[i];
    double cumulative = 0.0;
    for (int i = 0; i < head_dim; ++i) {
      cumulative += sorted[i];
      if (cumulative > kGroupCoverage * total) {
        first_above = i;
        break;
      }
    }
  }
  int group = 0;
  for (const double border : kGroupBorder) group += first_above > int(border * head_dim) ? 1 : 0;
  // Below ten channels the share rounds to none; one is kept, as the reference's recovery assumes.
  SelectBytes(s, head_dim, std::max(1, int(kGroupKept[group] * head_dim)), mask);
  return group;
}

}  // namespace sparkv

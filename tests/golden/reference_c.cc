// What golden.py calls for modes that only the reference has. Plain C names, so that ctypes finds
// them.
#include <algorithm>

#include "reference/reference.h"

#define GOLDEN_API extern "C" __attribute__((visibility("default")))

using sparkv::reference::Row;

GOLDEN_API void golden_channel_weight(const float* q, int group, int n_queries, int head_dim,
                                      double* u) {
  const Row weight =
      sparkv::reference::ChannelWeight(q, group, n_queries, head_dim, SPARKV_GROUP_SIGNED);
  std::copy(weight.begin(), weight.end(), u);
}

GOLDEN_API void golden_recover_sampled(const float* k, const double* u, int head_dim, int kept,
                                       const float* draws, int normal, int clip, double* out) {
  using namespace sparkv::reference;
  const Row row =
      RecoverSampled(k, Row(u, u + head_dim), kept, draws,
                     normal ? Draw::kNormal : Draw::kExponential, clip ? Over::kClip : Over::kMean);
  std::copy(row.begin(), row.end(), out);
}

GOLDEN_API void golden_recover_switches_off(const float* k, const double* u, int head_dim,
                                            double ratio, double* out) {
  const Row row = sparkv::reference::RecoverSwitchesOff(k, Row(u, u + head_dim), ratio);
  std::copy(row.begin(), row.end(), out);
}

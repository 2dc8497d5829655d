#include "baselines/baseline.h"

#include <cmath>

#include "baselines/ggml_rows.h"
#include "baselines/kivi.h"
#include "baselines/pruned_rows.h"
#include "baselines/turboquant.h"

namespace sparkv {
namespace {

void DropNotFinite(int n, float* x) {
  for (int i = 0; i < n; ++i) x[i] = std::isfinite(x[i]) ? x[i] : 0.0f;
}

// A row by itself, of keys or of values.
void CodeRow(const Baseline& baseline, bool key, int head_dim, float* x) {
  switch (baseline.codec) {
    case Codec::kTurboQuant:
      return TurboQuant(baseline.bits, head_dim, x);
    case Codec::kMustafar:
      return MustafarRow(baseline.ratio, head_dim, x);
    case Codec::kQ8_0:
    case Codec::kQ5_1:
    case Codec::kQ4_0:
      return GgmlRow(baseline.codec, key, head_dim, x);
    default:
      return;
  }
}

}  // namespace

int KeyBlock(const Baseline& baseline) { return baseline.codec == Codec::kKivi ? kKiviGroup : 1; }

bool NeedsChannels(const Baseline& baseline) { return baseline.codec == Codec::kThink; }

void CodeKeys(const Baseline& baseline, const uint16_t* channels, int n_tokens, int head_dim,
              float* k) {
  DropNotFinite(n_tokens * head_dim, k);
  if (baseline.codec == Codec::kKivi) return KiviKeys(baseline.bits, n_tokens, head_dim, k);
  for (int t = 0; t < n_tokens; ++t, k += head_dim) {
    if (NeedsChannels(baseline) && channels != nullptr) ThinkKey(channels, head_dim, k);
    CodeRow(baseline, true, head_dim, k);
  }
}

void CodeValue(const Baseline& baseline, int head_dim, float* v) {
  DropNotFinite(head_dim, v);
  if (baseline.codec == Codec::kKivi) return KiviValue(baseline.bits, head_dim, v);
  CodeRow(baseline, false, head_dim, v);
}

double KeyBits(const Baseline& baseline, int head_dim) {
  if (baseline.codec == Codec::kKivi) return KiviKeyBits(baseline.bits);
  if (baseline.codec == Codec::kThink) return ThinkKeyBits(baseline.ratio, head_dim);
  return ValueBits(baseline, head_dim);
}

double ValueBits(const Baseline& baseline, int head_dim) {
  switch (baseline.codec) {
    case Codec::kKivi:
      return KiviValueBits(baseline.bits, head_dim);
    case Codec::kTurboQuant:
      return TurboQuantBits(baseline.bits, head_dim);
    case Codec::kMustafar:
      return MustafarBits(baseline.ratio, head_dim);
    case Codec::kQ8_0:
    case Codec::kQ5_1:
    case Codec::kQ4_0:
      return GgmlRowBits(baseline.codec, head_dim);
    default:
      return 16.0;
  }
}

}  // namespace sparkv

// The oracle: docs/method.md in double precision, in its order, with plain loops. For tests only;
// never shipped.
#pragma once

#include <cstdint>
#include <vector>

#include "sparkv/sparkv.h"

namespace sparkv::reference {

using Row = std::vector<double>;    // one number per channel, or per entry where said
using Mask = std::vector<uint8_t>;  // 1 = kept

// S2. q: [group][n_queries][head_dim]
Row ChannelWeight(const float* q, int group, int n_queries, int head_dim, sparkv_group how);

// S3. k: [u.size()]
Row Contribution(const float* k, const Row& u);

// Channels by falling contribution, NaN first, equal ones by index.
std::vector<int> Order(const Row& s);

// S4.
Mask Select(const Row& s, int kept);

// Mean of s[j] over s[j] < threshold; 0 if there is none.
double MeanBelow(const Row& s, double threshold);

// S5 and S6. Row a is the restored magnitude per unit of the token's scalar.
Row RestoreTable(const Row& u, sparkv_recover how);
Row RecoverKey(const float* k, const Row& u, const Mask& mask, sparkv_recover how);

// SparK-g.
int SelectGroup(const float* k, const Row& u, Mask* mask);

// The recoveries that cannot be stored, from injected draws (unit exponential, standard normal)
// before scaling.
enum class Draw { kExponential, kNormal };
enum class Over { kMean, kClip };  // what a draw above the threshold becomes
Row RecoverSampled(const float* k, const Row& u, int kept, const float* draws, Draw draw,
                   Over over);

// What the published code does with both of its switches at 0: the mask of `ratio`, but a scalar
// from the entries below the int(ratio * head_dim)-th largest. A bug, kept here to document it.
Row RecoverSwitchesOff(const float* k, const Row& u, double ratio);

// Value pruning of one head; mask and out: [n_tokens][head_dim].
struct PrunedValues {
  Mask mask;
  Row out;
};
PrunedValues PruneValues(const float* v, int n_tokens, int head_dim, double ratio,
                         sparkv_recover how);
PrunedValues PruneValuesTopP(const float* v, int n_tokens, int head_dim, double top_p,
                             sparkv_recover how);

// ThinK's mask for a whole head. q: [group][n_queries][head_dim]; k: [n_tokens][head_dim]
Mask ThinkMask(const float* q, int group, int n_queries, const float* k, int n_tokens, int head_dim,
               double ratio);

// Trellis-coded rows (docs/method.md, section 13; docs/format.md), bit by bit and state by state.
// Level of a code of `bits` bits, outermost 1.
double TrellisLevel(int bits, int code);
// Levels of consecutive numbers, bits[i] each, of a row whose planes start at `planes`,
// [bits.size()].
Row TrellisLevels(const uint8_t* planes, const std::vector<int>& bits);
// Smallest sum of (x[i] - scale[i] * level)^2 over all paths. bits[i]: of number i.
double TrellisLoss(const Row& x, const Row& scale, const std::vector<int>& bits);
// A key with tiers of tier_bits[0..3] bits, of which the last may have none; table: f16 weights,
// their two lowest bits the tier.
Row UnpackTiers(const uint8_t* row, const uint16_t* table, int head_dim, const int* tier_bits);
// A value, back from the rotated basis.
Row UnpackTrellisValue(const uint8_t* row, int head_dim, int bits);

// Dense attention with the meaning of ggml's FLASH_ATTN_EXT. Head i reads KV head i / (n_heads /
// n_kv_heads).
struct Attention {
  int n_heads = 1, n_kv_heads = 1, n_tokens = 1, n_kv = 0, k_dim = 0, v_dim = 0;
  double scale = 1.0, max_bias = 0.0, softcap = 0.0;
  const float* q = nullptr;  // [n_tokens][n_heads][k_dim]
  const float* k = nullptr;  // [n_kv][n_kv_heads][k_dim]
  const float* v = nullptr;  // [n_kv][n_kv_heads][v_dim]
  const float* mask =
      nullptr;  // [n_tokens][n_kv], added to the score; -inf = not seen; NULL = all seen
  const float* sinks = nullptr;  // [n_heads] logits without a value, or NULL
};
Row Attend(const Attention& args);  // [n_tokens][n_heads][v_dim]; 0 where nothing is seen

}  // namespace sparkv::reference

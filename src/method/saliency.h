// What a channel of one key contributes, and which channels are kept (docs/method.md, S3 and S4).
#pragma once

#include <cstdint>

namespace sparkv {

// True if no channel has a positive finite weight: nothing was observed, |k| alone decides and
// restored magnitudes are equal.
bool NoWeights(const float* u, int head_dim);

// s[j] = k[j]^2 * u[j], in float, so that ties are those of float; k[j]^2 without weights. The
// order is that of |k| * sqrt(u). The paper's order, |k| * u, is had by passing u[j]^2.
void Contribution(const float* k, const float* u, int head_dim, float* s);

// mask[j] = 1 for the `kept` largest contributions (SelectTop), else 0.
void SelectChannels(const float* k, const float* u, int head_dim, int kept, uint8_t* mask);

// As SelectTop, with the mask as bytes.
void SelectBytes(const float* score, int n, int kept, uint8_t* mask);

}  // namespace sparkv

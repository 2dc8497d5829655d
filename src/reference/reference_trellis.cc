#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/half.h"
#include "reference/reference.h"

namespace sparkv::reference {
namespace {

// Subset of levels that a step from p[i-1], p[i-2] by p[i] allows.
int Subset(int now, int before, int two_before) { return (now ^ two_before) << 1 | before; }

// Orthonormal Hadamard matrix, entry by entry: (-1)^(number of ones of row & column) / sqrt(n), on
// blocks of the largest power of two that divides `run`.
Row Rotated(const Row& x, int run) {
  const int block = run & -run;
  Row out(x.size(), 0.0);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t first = i - i % size_t(block);
    for (int j = 0; j < block; ++j) {
      int ones = 0;
      for (int both = int(i - first) & j; both != 0; both >>= 1) ones += both & 1;
      out[i] += (ones % 2 == 0 ? 1.0 : -1.0) * x[first + size_t(j)] / std::sqrt(double(block));
    }
  }
  return out;
}

}  // namespace

double TrellisLevel(int bits, int code) {
  const int half = 1 << bits, top = bits >= 6 ? 1023 : 127;
  const int i = code >= half ? code - half : half - 1 - code;
  const double x = (i + 0.5) / (half - 0.5);
  const double magnitude = std::floor(top * x * (0.45 + 0.55 * x) + 0.5) / top;
  return code >= half ? magnitude : -magnitude;
}

Row TrellisLevels(const uint8_t* planes, const std::vector<int>& bits) {
  const size_t n = bits.size();
  std::vector<int> path(n, 0), upper(n, 0);
  for (int plane = 0; plane < *std::max_element(bits.begin(), bits.end()); ++plane) {
    size_t here = 0;
    while (here < n && bits[here] > plane) ++here;  // bits do not rise
    for (size_t i = 0; i < here; ++i) {
      const int bit = planes[i / 8] >> (i % 8) & 1;
      if (plane == 0) {
        path[i] = bit;
      } else {
        upper[i] |= bit << (plane - 1);
      }
    }
    planes += (here + 7) / 8;
  }
  Row levels(n, 0.0);
  for (size_t i = 0; i < n && bits[i] > 0; ++i) {
    const int before = i > 0 ? path[i - 1] : 0, two_before = i > 1 ? path[i - 2] : 0;
    levels[i] = TrellisLevel(bits[i], upper[i] << 2 | Subset(path[i], before, two_before));
  }
  return levels;
}

double TrellisLoss(const Row& x, const Row& scale, const std::vector<int>& bits) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::array<std::array<double, 2>, 2> loss = {{{0.0, kNever}, {kNever, kNever}}};  // [p1][p2]
  for (size_t i = 0; i < x.size(); ++i) {
    std::array<std::array<double, 2>, 2> next = {{{kNever, kNever}, {kNever, kNever}}};
    for (int before = 0; before < 2; ++before) {
      for (int two_before = 0; two_before < 2; ++two_before) {
        for (int now = 0; now < 2; ++now) {
          double best = kNever;
          for (int code = Subset(now, before, two_before); code < 2 << bits[i]; code += 4) {
            const double off = x[i] - scale[i] * TrellisLevel(bits[i], code);
            best = std::min(best, off * off);
          }
          double& to = next[size_t(now)][size_t(before)];
          to = std::min(to, loss[size_t(before)][size_t(two_before)] + best);
        }
      }
    }
    loss = next;
  }
  return std::min(std::min(loss[0][0], loss[0][1]), std::min(loss[1][0], loss[1][1]));
}

Row UnpackTiers(const uint8_t* row, const uint16_t* table, int head_dim, const int* tier_bits) {
  const int quarter = head_dim / 4;
  std::vector<int> bits;
  for (int i = 0; i < head_dim; ++i) bits.push_back(tier_bits[i / quarter]);
  Row z = TrellisLevels(row + 3, bits);
  for (int i = 0; i < head_dim; ++i) {
    int gain = 0;
    for (int b = 0; b < 6; ++b) {
      const int at = 6 * (i / quarter) + b;
      gain |= (row[at / 8] >> (at % 8) & 1) << b;
    }
    z[size_t(i)] *= gain == 63  ? std::numeric_limits<double>::quiet_NaN()
                    : gain == 0 ? 0.0
                                : std::exp2((gain - 1) / 4.0 - 8.0);
  }
  z = Rotated(z, quarter);
  Row key(static_cast<size_t>(head_dim));
  size_t at = 0;
  for (int tier = 0; tier < 4; ++tier) {
    for (int j = 0; j < head_dim; ++j) {
      if ((table[j] & 3) == tier) key[size_t(j)] = z[at++] * double(HalfToFloat(table[j]));
    }
  }
  return key;
}

Row UnpackTrellisValue(const uint8_t* row, int head_dim, int bits) {
  Row x = TrellisLevels(row + 1, std::vector<int>(static_cast<size_t>(head_dim), bits));
  const int gain = row[0];
  for (double& number : x) {
    number *= gain == 255 ? std::numeric_limits<double>::quiet_NaN()
              : gain == 0 ? 0.0
                          : std::exp2((gain - 1) / 4.0 - 40.0);
  }
  return Rotated(x, head_dim);
}

}  // namespace sparkv::reference

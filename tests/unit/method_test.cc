// The float method, through the C functions, against the double-precision reference and against
// known answers.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "cache/weight_tables.h"
#include "config/config.h"
#include "format/row_layout.h"
#include "method/observe.h"
#include "method/select.h"
#include "reference/reference.h"
#include "sparkv/sparkv.h"

namespace sparkv {
namespace {

using Floats = std::vector<float>;
using reference::Mask;
using reference::Row;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
const int kHeadDims[] = {32, 40, 64, 80, 96, 112, 128, 192, 256, 512};

// A call that must succeed.
#define SPARKV_CALL(call)                       \
  do {                                          \
    sparkv_error error = {};                    \
    ASSERT_EQ((call), SPARKV_OK) << error.text; \
  } while (0)

// Heavy tails, a few outlier channels, offsets; all exact in f16, as a cache holds them.
Floats HardRows(std::mt19937& random, int n_rows, int head_dim) {
  std::normal_distribution<float> normal;
  Floats scale, offset;
  for (int j = 0; j < head_dim; ++j) {
    scale.push_back(std::exp(normal(random)) * (random() % 16 == 0 ? 20.0f : 1.0f));
    offset.push_back(random() % 8 == 0 ? 3.0f * normal(random) : 0.0f);
  }
  Floats rows;
  for (int i = 0; i < n_rows * head_dim; ++i) {
    const size_t j = size_t(i % head_dim);
    rows.push_back(HalfToFloat(FloatToHalf(scale[j] * normal(random) + offset[j])));
  }
  return rows;
}

// Few distinct numbers, zeros of both signs: every product is exact in float, so ties are the same
// in both arithmetics.
Floats TiedRows(std::mt19937& random, int n_rows, int head_dim) {
  Floats rows;
  for (int i = 0; i < n_rows * head_dim; ++i) {
    const float x = float(int(random() % 7) - 3) * 0.5f;
    rows.push_back(x == 0.0f && random() % 2 == 0 ? -0.0f : x);
  }
  return rows;
}

Floats TiedWeights(std::mt19937& random, int head_dim) {
  Floats u;
  for (int j = 0; j < head_dim; ++j) u.push_back(std::ldexp(1.0f, int(random() % 5) - 2));
  return u;
}

Mask Select(const Floats& k, const Floats& u, int kept) {
  Mask mask(k.size(), 7);
  sparkv_error error = {};
  EXPECT_EQ(sparkv_select(k.data(), u.data(), int(k.size()), kept, mask.data(), &error), SPARKV_OK)
      << error.text;
  return mask;
}

Floats Recover(const Floats& k, const Floats& u, const Mask& mask, sparkv_recover how) {
  Floats out(k.size(), 12345.0f);
  sparkv_error error = {};
  EXPECT_EQ(
      sparkv_recover_key(k.data(), u.data(), mask.data(), int(k.size()), how, out.data(), &error),
      SPARKV_OK)
      << error.text;
  return out;
}

void ExpectNear(const Floats& got, const Row& want, double relative, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want[i])) {
      EXPECT_TRUE(std::isnan(got[i])) << what << " at " << i;
    } else {
      ASSERT_LE(std::fabs(got[i] - want[i]), relative * std::fabs(want[i]) + 1e-30)
          << what << " at " << i;
    }
  }
}

// Both keep the same channels, but for contributions closer than float can tell apart.
void ExpectSameChoice(const Mask& got, const Mask& want, const Row& s) {
  ASSERT_EQ(std::count(got.begin(), got.end(), 1), std::count(want.begin(), want.end(), 1));
  double smallest_kept = kInf, largest_pruned = 0.0;
  for (size_t j = 0; j < s.size(); ++j) {
    if (got[j] != 0) smallest_kept = std::min(smallest_kept, s[j]);
    if (got[j] == 0) largest_pruned = std::max(largest_pruned, s[j]);
  }
  EXPECT_GE(smallest_kept, largest_pruned * (1.0 - 1e-6));
}

Row ToRow(const Floats& x) { return Row(x.begin(), x.end()); }

TEST(ChannelWeight, AgreesWithTheReferenceForAnyWindowAndGroup) {
  std::mt19937 random(1);
  for (int head_dim : kHeadDims) {
    for (int n_queries : {1, 7, 32}) {
      for (int group : {1, 3, 8}) {
        for (sparkv_group how : {SPARKV_GROUP_SIGNED, SPARKV_GROUP_ENERGY}) {
          const Floats q = HardRows(random, group * n_queries, head_dim);
          Floats u(size_t(head_dim), 0.0f);
          SPARKV_CALL(
              sparkv_channel_weight(q.data(), group, n_queries, head_dim, how, u.data(), &error));
          ExpectNear(u, reference::ChannelWeight(q.data(), group, n_queries, head_dim, how), 2e-7,
                     "u");
        }
      }
    }
  }
}

TEST(ChannelWeight, HeadsOfAGroupCancelOnlyWhenSigned) {
  const Floats q = {3.0f, 1.0f, -3.0f, 1.0f};  // two heads, one query, two channels
  float u[2];
  SPARKV_CALL(sparkv_channel_weight(q.data(), 2, 1, 2, SPARKV_GROUP_SIGNED, u, &error));
  EXPECT_EQ(u[0], 0.0f);
  EXPECT_EQ(u[1], 1.0f);
  SPARKV_CALL(sparkv_channel_weight(q.data(), 2, 1, 2, SPARKV_GROUP_ENERGY, u, &error));
  EXPECT_EQ(u[0], 3.0f);
  EXPECT_EQ(u[1], 1.0f);
}

TEST(ShareInPairs, PairsThatRopeTurnsGetTheirMeanAndNothingElseChanges) {
  Floats normal = {1, 3, 5, 9, 7, 7, 2, 4};
  ShareInPairs(normal.data(), 8, 6, false);
  EXPECT_EQ(normal, (Floats{2, 2, 7, 7, 7, 7, 2, 4}));
  Floats neox = {1, 3, 5, 9, 7, 7, 2, 4};
  ShareInPairs(neox.data(), 8, 6, true);
  EXPECT_EQ(neox, (Floats{5, 5, 6, 5, 5, 6, 2, 4}));
  for (const int n_rot : {0, -2, 10}) {
    Floats same = {1, 3, 5, 9, 7, 7, 2, 4};
    ShareInPairs(same.data(), 8, n_rot, true);
    EXPECT_EQ(same, (Floats{1, 3, 5, 9, 7, 7, 2, 4})) << n_rot;
  }
}

TEST(MakeTierTable, TiersGoByFallingSaliencyAndWeightedKeysAreAboutOne) {
  std::mt19937 random(3);
  for (const int dim : kHeadDims) {
    Floats q(static_cast<size_t>(dim)), k(q.size());
    std::lognormal_distribution<float> energy(0.0f, 2.0f);
    for (float& x : q) x = energy(random);
    for (float& x : k) x = energy(random);
    q[1] = kNaN;
    k[2] = kInf;
    q[3] = 0.0f;  // not read so far
    k[1] = k[3] = 1e-6f;
    std::vector<uint16_t> table(q.size());
    MakeTierTable(q.data(), k.data(), dim, table.data());
    int count[4] = {};
    double lowest[4] = {1e30, 1e30, 1e30, 1e30}, highest[4] = {}, sum = 0.0;
    for (size_t j = 0; j < q.size(); ++j) {
      const int tier = TierOf(table[j]);
      ++count[tier];
      EXPECT_GT(table[j], 0x0400u);
      EXPECT_LT(table[j], 0x7c00u);
      if (j == 1 || j == 2 || j == 3) continue;
      const double s = double(q[j]) * double(k[j]), a = HalfToFloat(table[j]);
      lowest[tier] = std::min(lowest[tier], s);
      highest[tier] = std::max(highest[tier], s);
      sum += k[j] / (a * a);
    }
    for (int tier = 0; tier < 4; ++tier) EXPECT_EQ(count[tier], dim / 4);
    for (int tier = 0; tier < 3; ++tier) EXPECT_GE(lowest[tier], highest[tier + 1]);
    EXPECT_NEAR(sum / dim, 1.0, 0.3) << dim;
    EXPECT_EQ(TierOf(table[3]), 3);
  }
}

TEST(SelectTop, AgreesWithAStableSortOnEverySizeAndKind) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 20000; ++round) {
    const int n = 1 + int(random() % 512);
    const int kept = int(random() % unsigned(n + 1));
    Floats score;
    for (int j = 0; j < n; ++j) {
      float x = normal(random) * normal(random);
      x *= x;
      switch (round % 5) {
        case 1:
          x = float(random() % 4);
          break;
        case 2:
          x = std::ldexp(x, int(random() % 270) - 149);
          break;
        case 3:
          x = random() % 9 == 0 ? kNaN : random() % 9 == 0 ? kInf : x;
          break;
        case 4:
          x = random() % 3 == 0 ? (random() % 2 == 0 ? -0.0f : 0.0f) : x;
          break;
        default:
          break;
      }
      score.push_back(x);
    }
    uint64_t bits[8] = {};
    SelectTop(score.data(), n, kept, bits);
    const Mask want = reference::Select(ToRow(score), kept);
    for (int j = 0; j < (n + 63) / 64 * 64; ++j) {
      ASSERT_EQ(int(bits[j / 64] >> (j % 64) & 1), j < n ? int(want[size_t(j)]) : 0)
          << "round " << round << " n " << n << " kept " << kept << " channel " << j;
    }
  }
}

TEST(SelectTop, EveryNaNIsTheSameWhateverItsBits) {
  const float negative_nan = std::bit_cast<float>(0xffc12345u);
  const float scores[] = {1.0f, negative_nan, kInf, kNaN, 5.0f};
  uint64_t bits = 0;
  SelectTop(scores, 5, 1, &bits);
  EXPECT_EQ(bits, 0b00010u);
  SelectTop(scores, 5, 2, &bits);
  EXPECT_EQ(bits, 0b01010u);
  SelectTop(scores, 5, 3, &bits);
  EXPECT_EQ(bits, 0b01110u);
}

TEST(Select, KeepsTheSameChannelsAsTheReference) {
  std::mt19937 random(3);
  for (int head_dim : kHeadDims) {
    for (double ratio : {0.0, 0.01, 0.3, 0.5, 0.8, 0.99, 1.0}) {
      const int kept = KeptChannels(ratio, head_dim);
      const Floats k = HardRows(random, 1, head_dim), u = HardRows(random, 1, head_dim);
      Floats weight;
      for (float x : u) weight.push_back(std::fabs(x));
      const Row s = reference::Contribution(k.data(), ToRow(weight));
      ExpectSameChoice(Select(k, weight, kept), reference::Select(s, kept), s);
      const Floats tied = TiedRows(random, 1, head_dim),
                   tied_weight = TiedWeights(random, head_dim);
      EXPECT_EQ(Select(tied, tied_weight, kept),
                reference::Select(reference::Contribution(tied.data(), ToRow(tied_weight)), kept))
          << "ties, head_dim " << head_dim << " ratio " << ratio;
    }
  }
}

TEST(Select, EqualContributionsGoToTheSmallerChannel) {
  const Floats k = {1.0f, -1.0f, 2.0f, 1.0f}, u = {1.0f, 1.0f, 0.25f, 1.0f};
  EXPECT_EQ(Select(k, u, 1), (Mask{1, 0, 0, 0}));
  EXPECT_EQ(Select(k, u, 3), (Mask{1, 1, 1, 0}));
}

TEST(Select, WithoutWeightsTheMagnitudeDecides) {
  const Floats k = {1.0f, -4.0f, 2.0f, 3.0f};
  EXPECT_EQ(Select(k, Floats(4, 0.0f), 2), (Mask{0, 1, 0, 1}));
}

TEST(RecoverKey, AgreesWithTheReferenceInEveryMode) {
  std::mt19937 random(4);
  for (int head_dim : kHeadDims) {
    for (double ratio : {0.01, 0.3, 0.5, 0.8, 0.99, 1.0}) {
      for (bool tied : {false, true}) {
        const Floats k = tied ? TiedRows(random, 1, head_dim) : HardRows(random, 1, head_dim);
        Floats u = tied ? TiedWeights(random, head_dim) : HardRows(random, 1, head_dim);
        for (float& x : u) x = std::fabs(x);
        const Mask mask = Select(k, u, KeptChannels(ratio, head_dim));
        for (sparkv_recover how :
             {SPARKV_RECOVER_ZERO, SPARKV_RECOVER_MEAN, SPARKV_RECOVER_PAPER}) {
          const Floats got = Recover(k, u, mask, how);
          ExpectNear(got, reference::RecoverKey(k.data(), ToRow(u), mask, how), 5e-7, "recovered");
          for (size_t j = 0; j < k.size(); ++j) {
            if (mask[j] == 0) continue;
            ASSERT_EQ(std::memcmp(&got[j], &k[j], sizeof(float)), 0) << "kept " << j;
          }
        }
      }
    }
  }
}

TEST(RecoverKey, MeanIsTheRootOfTheMeanContributionOverTheWeight) {
  const Floats k = {4.0f, 1.0f, -1.0f, 0.0f}, u = {1.0f, 4.0f, 1.0f, 0.25f};
  // s = 16 4 1 0; kept: 0, 1; c = (1 + 0) / 2; sqrt(c / u) = sqrt(1/2), sqrt(2); an exact zero
  // turns negative
  const Floats got = Recover(k, u, {1, 1, 0, 0}, SPARKV_RECOVER_MEAN);
  EXPECT_EQ(got[0], 4.0f);
  EXPECT_EQ(got[1], 1.0f);
  EXPECT_FLOAT_EQ(got[2], -std::sqrt(0.5f));
  EXPECT_FLOAT_EQ(got[3], -std::sqrt(2.0f));
}

TEST(RecoverKey, PaperIsTheMeanWeightedMagnitudeOverTheWeight) {
  const Floats k = {4.0f, 1.0f, -1.0f, 2.0f}, u = {1.0f, 4.0f, 1.0f, 0.25f};
  const Floats got = Recover(k, u, {1, 1, 0, 0}, SPARKV_RECOVER_PAPER);
  EXPECT_FLOAT_EQ(got[2], -0.75f);  // c = (1 * 1 + 0.25 * 2) / 2
  EXPECT_FLOAT_EQ(got[3], 3.0f);
}

TEST(RecoverKey, PaperMagnitudeIsTheLeastSquaresOne) {
  std::mt19937 random(5);
  const int head_dim = 64;
  const Floats k = HardRows(random, 1, head_dim);
  Floats u = HardRows(random, 1, head_dim);
  for (float& x : u) x = std::fabs(x) + 0.01f;
  const Mask mask = Select(k, u, 20);
  const Floats got = Recover(k, u, mask, SPARKV_RECOVER_PAPER);
  const auto error = [&](double factor) {
    double sum = 0.0;
    for (size_t j = 0; j < k.size(); ++j) {
      if (mask[j] == 0) sum += std::pow(u[j] * (k[j] - factor * got[j]), 2);
    }
    return sum;
  };
  EXPECT_LT(error(1.0), error(1.001));
  EXPECT_LT(error(1.0), error(0.999));
}

TEST(RecoverKey, NothingPrunedIsAnExactCopy) {
  const Floats k = {1.0f, -0.0f, kNaN, kInf, 1e-40f}, u = {1.0f, 0.0f, 2.0f, kNaN, 1.0f};
  for (sparkv_recover how : {SPARKV_RECOVER_ZERO, SPARKV_RECOVER_MEAN, SPARKV_RECOVER_PAPER}) {
    const Floats got = Recover(k, u, Select(k, u, 5), how);
    EXPECT_EQ(std::memcmp(got.data(), k.data(), k.size() * sizeof(float)), 0);
  }
}

TEST(RecoverKey, NothingKeptLeavesSignsAndOneMagnitude) {
  const Floats k = {3.0f, -4.0f, 0.0f, 5.0f}, u(4, 2.0f);
  const Mask none = Select(k, u, 0);
  EXPECT_EQ(none, Mask(4, 0));
  const Floats got = Recover(k, u, none, SPARKV_RECOVER_MEAN);
  const float magnitude = std::sqrt((9.0f + 16.0f + 25.0f) / 4.0f);
  EXPECT_FLOAT_EQ(got[0], magnitude);
  EXPECT_FLOAT_EQ(got[1], -magnitude);
  EXPECT_FLOAT_EQ(got[2], -magnitude);
  EXPECT_FLOAT_EQ(got[3], magnitude);
}

TEST(RecoverKey, PrunedTiesOfTheThresholdKeepOutOfTheMean) {
  const Floats k = {2.0f, 2.0f, 1.0f, 2.0f}, u(4, 1.0f);
  const Floats got = Recover(k, u, Select(k, u, 2), SPARKV_RECOVER_MEAN);
  EXPECT_FLOAT_EQ(got[2], 1.0f);  // only the third is below the threshold
  EXPECT_FLOAT_EQ(got[3], 1.0f);
}

TEST(RecoverKey, DeadChannelsAreRestoredAsZeroNotInfinity) {
  const Floats k = {5.0f, 1.0f, 2.0f, -3.0f}, u = {1.0f, 0.0f, 0.5e-12f, 0.5f};
  for (sparkv_recover how : {SPARKV_RECOVER_MEAN, SPARKV_RECOVER_PAPER}) {
    const Floats got = Recover(k, u, {1, 0, 0, 0}, how);
    EXPECT_EQ(got[1], 0.0f);
    EXPECT_EQ(got[2], 0.0f);
    EXPECT_LT(got[3], 0.0f);
    EXPECT_TRUE(std::isfinite(got[3]));
  }
}

TEST(RecoverKey, WithoutWeightsMagnitudesAreEqual) {
  const Floats k = {4.0f, 1.0f, -3.0f}, u(3, 0.0f);
  const Floats mean = Recover(k, u, Select(k, u, 1), SPARKV_RECOVER_MEAN);
  EXPECT_FLOAT_EQ(mean[1], std::sqrt(5.0f));
  EXPECT_FLOAT_EQ(mean[2], -std::sqrt(5.0f));
  const Floats paper = Recover(k, u, Select(k, u, 1), SPARKV_RECOVER_PAPER);
  EXPECT_FLOAT_EQ(paper[1], 2.0f);
  EXPECT_FLOAT_EQ(paper[2], -2.0f);
}

TEST(RecoverKey, NaNAndInfinityAreKeptFirstAndTheRestStaysFinite) {
  Floats k(64, 1.0f), u(64, 1.0f);
  k[7] = kNaN;
  k[9] = -kInf;
  for (size_t j = 32; j < 64; ++j) k[j] = 0.5f;
  const Mask mask = Select(k, u, 16);
  EXPECT_EQ(mask[7], 1);
  EXPECT_EQ(mask[9], 1);
  for (sparkv_recover how : {SPARKV_RECOVER_MEAN, SPARKV_RECOVER_PAPER}) {
    const Floats got = Recover(k, u, mask, how);
    EXPECT_TRUE(std::isnan(got[7]));
    EXPECT_EQ(got[9], -kInf);
    for (size_t j = 0; j < 64; ++j) {
      EXPECT_TRUE(j == 7 || j == 9 || std::isfinite(got[j])) << j;
    }
  }
}

TEST(RecoverKey, AWeightThatIsNotFiniteHarmsNoToken) {
  const Floats k = {1.0f, 2.0f, 3.0f, 4.0f}, u = {kNaN, 1.0f, kInf, 1.0f};
  EXPECT_EQ(Select(k, u, 2), (Mask{1, 0, 1, 0}));
  const Floats got = Recover(k, u, {0, 0, 0, 1}, SPARKV_RECOVER_MEAN);
  for (float x : got) EXPECT_TRUE(std::isfinite(x));
  EXPECT_EQ(got[0], 0.0f);
  EXPECT_EQ(got[2], 0.0f);
  EXPECT_FLOAT_EQ(got[1], 2.0f);
}

TEST(GroupMode, AgreesWithTheReference) {
  std::mt19937 random(6);
  int seen[5] = {};
  for (int round = 0; round < 400; ++round) {
    const int head_dim = kHeadDims[round % 10];
    Floats k = HardRows(random, 1, head_dim);
    Floats u = HardRows(random, 1, head_dim);
    for (float& x : u) x = std::fabs(x);
    if (round % 4 == 0) {  // flat and peaked tokens reach the outer groups
      for (float& x : k) x = x > 0.0f ? 1.0f : -1.0f;
      std::fill(u.begin(), u.end(), 1.0f);
    } else if (round % 4 == 1) {
      k[size_t(round % head_dim)] = 3000.0f;
    }
    int32_t group = -1;
    Mask mask(k.size(), 7);
    Floats out(k.size());
    SPARKV_CALL(sparkv_group_mode(k.data(), u.data(), head_dim, SPARKV_RECOVER_MEAN, &group,
                                  mask.data(), out.data(), &error));
    Mask want;
    EXPECT_EQ(group, reference::SelectGroup(k.data(), ToRow(u), &want)) << "round " << round;
    ExpectSameChoice(mask, want, reference::Contribution(k.data(), ToRow(u)));
    ExpectNear(out, reference::RecoverKey(k.data(), ToRow(u), mask, SPARKV_RECOVER_MEAN), 5e-7,
               "group");
    ++seen[group];
  }
  EXPECT_GT(seen[0], 0);
  EXPECT_GT(seen[1] + seen[2] + seen[3], 0);
  EXPECT_GT(seen[4], 0);
}

TEST(GroupMode, KeepsTheMiddleOfEachFifth) {
  const int head_dim = 128;
  const int kept[5] = {12, 38, 64, 89, 115};
  for (int group = 0; group < 5; ++group) {
    // Equal channels up to a border, nothing beyond: the covering position is just above it.
    Floats k(head_dim, 0.0f), u(head_dim, 1.0f);
    const int n = int((0.2 * group + 0.05) * head_dim) + 1;
    std::fill(k.begin(), k.begin() + n, 1.0f);
    int32_t id = -1;
    Mask mask(head_dim);
    Floats out(head_dim);
    SPARKV_CALL(sparkv_group_mode(k.data(), u.data(), head_dim, SPARKV_RECOVER_ZERO, &id,
                                  mask.data(), out.data(), &error));
    EXPECT_EQ(id, group);
    EXPECT_EQ(std::count(mask.begin(), mask.end(), 1), kept[group]);
  }
}

TEST(GroupMode, AZeroOrNaNTokenFallsIntoTheFirstGroup) {
  for (float x : {0.0f, kNaN}) {
    const Floats k(64, x), u(64, 1.0f);
    int32_t group = -1;
    Mask mask(64);
    Floats out(64);
    SPARKV_CALL(sparkv_group_mode(k.data(), u.data(), 64, SPARKV_RECOVER_MEAN, &group, mask.data(),
                                  out.data(), &error));
    EXPECT_EQ(group, 0);
    EXPECT_EQ(std::count(mask.begin(), mask.end(), 1), 6);
  }
}

// Wrong places are allowed only where two scores are closer than float can tell apart: redraw
// instead of arguing.
TEST(PruneValues, AgreesWithTheReference) {
  std::mt19937 random(7);
  for (int n_tokens : {1, 2, 50}) {
    for (int head_dim : {32, 80, 128}) {
      for (double ratio : {0.3, 0.8, 1.0}) {
        for (sparkv_recover how : {SPARKV_RECOVER_ZERO, SPARKV_RECOVER_MEAN}) {
          const Floats v = HardRows(random, n_tokens, head_dim);
          Mask mask(v.size(), 7);
          Floats out(v.size());
          SPARKV_CALL(sparkv_prune_values(v.data(), n_tokens, head_dim, ratio, how, mask.data(),
                                          out.data(), &error));
          const auto want = reference::PruneValues(v.data(), n_tokens, head_dim, ratio, how);
          EXPECT_EQ(mask, want.mask);
          for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], want.out[i], 1e-6);
          SPARKV_CALL(sparkv_prune_values_top_p(v.data(), n_tokens, head_dim, 0.9, how, mask.data(),
                                                out.data(), &error));
          const auto top_p = reference::PruneValuesTopP(v.data(), n_tokens, head_dim, 0.9, how);
          EXPECT_EQ(mask, top_p.mask);
          for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], top_p.out[i], 1e-6);
        }
      }
    }
  }
}

TEST(PruneValues, NothingPrunedIsAnExactCopy) {
  std::mt19937 random(8);
  const Floats v = HardRows(random, 5, 32);
  Mask mask(v.size());
  Floats out(v.size());
  SPARKV_CALL(sparkv_prune_values(v.data(), 5, 32, 0.01, SPARKV_RECOVER_MEAN, mask.data(),
                                  out.data(), &error));
  EXPECT_EQ(out, v);
  SPARKV_CALL(sparkv_prune_values_top_p(v.data(), 5, 32, 1.0, SPARKV_RECOVER_MEAN, mask.data(),
                                        out.data(), &error));
  EXPECT_EQ(out, v);
  SPARKV_CALL(sparkv_prune_values(v.data(), 0, 32, 0.5, SPARKV_RECOVER_MEAN, mask.data(),
                                  out.data(), &error));
}

TEST(PruneValues, ABadTokenDoesNotReachTheOthers) {
  std::mt19937 random(9);
  Floats v = HardRows(random, 20, 64);
  v[5 * 64 + 3] = kNaN;
  v[6 * 64 + 4] = kInf;
  Mask mask(v.size());
  Floats out(v.size());
  for (double top_p : {0.0, 0.9}) {
    if (top_p == 0.0) {
      SPARKV_CALL(sparkv_prune_values(v.data(), 20, 64, 0.5, SPARKV_RECOVER_MEAN, mask.data(),
                                      out.data(), &error));
    } else {
      SPARKV_CALL(sparkv_prune_values_top_p(v.data(), 20, 64, top_p, SPARKV_RECOVER_MEAN,
                                            mask.data(), out.data(), &error));
    }
    EXPECT_EQ(mask[5 * 64 + 3], 1);
    EXPECT_EQ(mask[6 * 64 + 4], 1);
    for (size_t i = 0; i < out.size(); ++i)
      EXPECT_EQ(std::isfinite(out[i]), std::isfinite(v[i])) << i;
    EXPECT_GT(std::count(mask.begin(), mask.begin() + 5 * 64, 1), 10);
  }
}

TEST(Think, AgreesWithTheReferenceAndIgnoresABadToken) {
  std::mt19937 random(10);
  for (int head_dim : {32, 80, 128}) {
    const Floats q = HardRows(random, 3 * 7, head_dim);
    Floats k = HardRows(random, 40, head_dim);
    Mask mask(size_t(head_dim), 7);
    SPARKV_CALL(sparkv_think(q.data(), 3, 7, k.data(), 40, head_dim, 0.5, mask.data(), &error));
    EXPECT_EQ(mask, reference::ThinkMask(q.data(), 3, 7, k.data(), 40, head_dim, 0.5));
    EXPECT_EQ(std::count(mask.begin(), mask.end(), 1), head_dim / 2);
    k.insert(k.end(), size_t(head_dim), kNaN);
    Mask with_nan(size_t(head_dim), 7);
    SPARKV_CALL(sparkv_think(q.data(), 3, 7, k.data(), 41, head_dim, 0.5, with_nan.data(), &error));
    EXPECT_EQ(mask, with_nan);
  }
}

TEST(MethodApi, WrongArgumentsAreNamedWithTheirValue) {
  const Floats x(64, 1.0f);
  Floats out(64);
  Mask mask(64);
  int32_t group = 0;
  sparkv_error e = {};
  const auto expect = [&](sparkv_status status, const char* text) {
    EXPECT_EQ(status, SPARKV_INVALID);
    EXPECT_STREQ(e.text, text);
  };
  expect(sparkv_select(x.data(), x.data(), 64, 65, mask.data(), &e), "kept: 65 is outside [0, 64]");
  expect(sparkv_select(x.data(), x.data(), 64, -1, mask.data(), &e), "kept: -1 is outside [0, 64]");
  expect(sparkv_select(x.data(), x.data(), 513, 1, mask.data(), &e),
         "head_dim: 513 is outside [1, 512]");
  expect(sparkv_select(nullptr, x.data(), 64, 1, mask.data(), &e), "k: NULL");
  expect(sparkv_select(x.data(), nullptr, 64, 1, mask.data(), &e), "u: NULL");
  Floats negative = x;
  negative[3] = -2.0f;
  expect(sparkv_select(x.data(), negative.data(), 64, 1, mask.data(), &e), "u[3]: -2 is negative");
  expect(sparkv_channel_weight(x.data(), 0, 1, 64, SPARKV_GROUP_SIGNED, out.data(), &e),
         "group: 0 is outside [1, 4096]");
  expect(
      sparkv_prune_values(x.data(), 1, 64, 2.0, SPARKV_RECOVER_MEAN, mask.data(), out.data(), &e),
      "ratio: 2 is outside [0, 1]");
  expect(sparkv_prune_values(x.data(), 1, 64, std::nan(""), SPARKV_RECOVER_MEAN, mask.data(),
                             out.data(), &e),
         "ratio: nan is outside [0, 1]");
  expect(
      sparkv_prune_values(x.data(), 1, 64, 0.5, SPARKV_RECOVER_PAPER, mask.data(), out.data(), &e),
      "how: 2 is outside [0, 1]");
  expect(sparkv_prune_values_top_p(x.data(), 1, 64, 0.0, SPARKV_RECOVER_MEAN, mask.data(),
                                   out.data(), &e),
         "top_p: 0 is outside (0, 1]");
  expect(sparkv_group_mode(x.data(), x.data(), 64, SPARKV_RECOVER_MEAN, nullptr, mask.data(),
                           out.data(), &e),
         "group_id: NULL");
  EXPECT_EQ(sparkv_group_mode(x.data(), x.data(), 0, SPARKV_RECOVER_MEAN, &group, mask.data(),
                              out.data(), nullptr),
            SPARKV_INVALID);
}

}  // namespace
}  // namespace sparkv

// The oracle itself, on inputs whose answer is known.
#include "reference/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace sparkv::reference {
namespace {

using Floats = std::vector<float>;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

TEST(ReferenceMethod, WeightsFollowTheDefinition) {
  // Two heads, two queries, two channels; q[head][query][channel].
  const Floats q = {1, 2, 3, 4, 5, 6, 7, 8};
  const Row u = ChannelWeight(q.data(), 2, 2, 2, SPARKV_GROUP_SIGNED);
  EXPECT_DOUBLE_EQ(u[0], std::sqrt(9.0 + 25.0));
  EXPECT_DOUBLE_EQ(u[1], std::sqrt(16.0 + 36.0));
  const Row energy = ChannelWeight(q.data(), 2, 2, 2, SPARKV_GROUP_ENERGY);
  EXPECT_DOUBLE_EQ(energy[0], std::sqrt((1.0 + 9.0 + 25.0 + 49.0) / 2.0));
}

TEST(ReferenceMethod, SampledDrawsGoToChannelsByRankAndSparePrunedSigns) {
  const Floats k = {4.0f, -1.0f, 2.0f, 0.0f}, draws = {0.001f, 0.004f, 0.002f, 0.003f};
  const Row u(4, 1.0);
  // s = 16 1 4 0, mean 5.25; order 0 2 1 3; draws by size .004 .003 .002 .001 times the mean, all
  // below the threshold 4.
  const Row got = RecoverSampled(k.data(), u, 2, draws.data(), Draw::kExponential, Over::kClip);
  EXPECT_DOUBLE_EQ(got[0], 4.0);
  EXPECT_DOUBLE_EQ(got[2], 2.0);
  EXPECT_NEAR(got[1], -std::sqrt(0.002 * 5.25), 1e-8);
  EXPECT_NEAR(got[3], -std::sqrt(0.001 * 5.25), 1e-8);
}

TEST(ReferenceMethod, SampledDrawsAboveTheThresholdBecomeItOrTheMean) {
  const Floats k = {4.0f, 1.0f, 2.0f, 1.0f}, draws = {9.0f, 9.0f, 9.0f, 9.0f};
  const Row u(4, 1.0);
  EXPECT_DOUBLE_EQ(RecoverSampled(k.data(), u, 2, draws.data(), Draw::kExponential, Over::kClip)[1],
                   2.0);
  EXPECT_DOUBLE_EQ(RecoverSampled(k.data(), u, 2, draws.data(), Draw::kExponential, Over::kMean)[1],
                   1.0);
}

TEST(ReferenceMethod, NormalDrawsUseTheSampleDeviation) {
  const Floats k = {4.0f, 1.0f, 2.0f, 1.0f}, draws(4, -0.5f);
  const Row u(4, 1.0);
  // s = 16 1 4 1: mean 5.5, deviation sqrt((110.25 + 20.25 + 2.25 + 20.25) / 3)
  const double x = std::fabs(5.5 - 0.5 * std::sqrt(153.0 / 3.0));
  const Row got = RecoverSampled(k.data(), u, 2, draws.data(), Draw::kNormal, Over::kClip);
  EXPECT_NEAR(got[1], std::sqrt(x), 1e-12);
}

Attention OneHead(const Floats& q, const Floats& k, const Floats& v) {
  Attention args;
  args.n_kv = int(k.size());
  args.k_dim = args.v_dim = 1;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  return args;
}

TEST(ReferenceAttention, EqualScoresAverageTheValues) {
  const Floats q = {0.0f}, k = {1.0f, 2.0f, 3.0f}, v = {1.0f, 2.0f, 6.0f};
  EXPECT_DOUBLE_EQ(Attend(OneHead(q, k, v))[0], 3.0);
}

TEST(ReferenceAttention, ScaleSoftcapAndMaskComeInThisOrder) {
  const Floats q = {2.0f}, k = {1.0f, -3.0f}, v = {1.0f, 0.0f}, mask = {-0.5f, 0.25f};
  Attention args = OneHead(q, k, v);
  args.scale = 0.5;
  args.softcap = 1.5;
  args.mask = mask.data();
  const double a = 1.5 * std::tanh(1.0 / 1.5) - 0.5, b = 1.5 * std::tanh(-3.0 / 1.5) + 0.25;
  EXPECT_NEAR(Attend(args)[0], std::exp(a) / (std::exp(a) + std::exp(b)), 1e-15);
}

TEST(ReferenceAttention, MaskedCellsAreNotSeenAndNothingSeenIsZero) {
  const Floats q = {1.0f, 1.0f}, k = {1.0f, 50.0f}, v = {3.0f, std::nanf("")};
  const Floats mask = {0.0f, kUnseen, kUnseen, kUnseen};
  Attention args = OneHead(q, k, v);
  args.n_tokens = 2;
  args.mask = mask.data();
  const Row got = Attend(args);
  EXPECT_DOUBLE_EQ(got[0], 3.0);
  EXPECT_DOUBLE_EQ(got[1], 0.0);
}

TEST(ReferenceAttention, SinksTakeWeightButGiveNoValue) {
  const Floats q = {0.0f}, k = {1.0f}, v = {4.0f}, sinks = {0.0f};
  Attention args = OneHead(q, k, v);
  args.sinks = sinks.data();
  EXPECT_DOUBLE_EQ(Attend(args)[0], 2.0);
  const Floats mask = {kUnseen};
  args.mask = mask.data();
  EXPECT_DOUBLE_EQ(Attend(args)[0], 0.0);
}

TEST(ReferenceAttention, AlibiSlopesFollowGgmlAlsoForOddHeadCounts) {
  // Three heads: two get 2^-(4 * (h + 1)), the third 2^-4 to the odd power 1 of half the bias:
  // 2^-2.
  const Floats q(3, 0.0f), k = {1.0f, 1.0f}, v = {1.0f, 0.0f}, mask = {-1.0f, 0.0f};
  Attention args = OneHead(q, k, v);
  args.n_heads = 3;
  args.max_bias = 8.0;
  args.mask = mask.data();
  const Row got = Attend(args);
  const double slope[3] = {std::pow(2.0, -4.0), std::pow(2.0, -8.0), std::pow(2.0, -2.0)};
  for (size_t h = 0; h < 3; ++h) EXPECT_NEAR(got[h], 1.0 / (1.0 + std::exp(slope[h])), 1e-12) << h;
}

TEST(ReferenceAttention, HeadsOfAGroupShareTheirKvHead) {
  const Floats q(4, 0.0f), k(2, 1.0f), v = {5.0f, 7.0f};  // one cell, two KV heads
  Attention args = OneHead(q, k, v);
  args.n_kv = 1;
  args.n_heads = 4;
  args.n_kv_heads = 2;
  EXPECT_EQ(Attend(args), (Row{5.0, 5.0, 7.0, 7.0}));
}

}  // namespace
}  // namespace sparkv::reference

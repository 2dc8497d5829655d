// What rows are said to lose is what they lost.
#include <gtest/gtest.h>

#include <cmath>

#include "cache_model.h"

namespace sparkv::test {
namespace {

constexpr int kTokens = 160;

struct Errors {
  double keys = -1.0, values = -1.0;
};

Errors Said(Host& host, int l, int h) {
  Errors e;
  EXPECT_EQ(sparkv_cache_errors(host.cache, l, h, &e.keys, &e.values, &host.error), SPARKV_OK)
      << host.error.text;
  return e;
}

// Of the rows first .. last - 1, read back, under the energies of all queries.
Errors Found(Host& host, int l, int h, int first, int last) {
  const Layer& layer = host.layer(l);
  std::vector<double> energy(size_t(layer.k_dim), 0.0);
  for (int t = 0; t < kTokens; ++t) {
    const std::vector<float> q = Numbers(Content(7, t), kQueries, l, layer.q_row());
    for (int g = 0; g < layer.group; ++g) {
      for (int j = 0; j < layer.k_dim; ++j) {
        const double x = q[size_t((h * layer.group + g) * layer.k_dim + j)];
        energy[size_t(j)] += x * x;
      }
    }
  }
  const auto relative = [&](bool keys) {
    const size_t n = keys ? layer.k_row() : layer.v_row();
    const int dim = keys ? layer.k_dim : layer.v_dim;
    double error = 0.0, square = 0.0;
    std::vector<uint16_t> row(n);
    for (int t = first; t < last; ++t) {
      const int64_t cell = host.sequence(0)[size_t(t)].cell;
      const auto read = keys ? sparkv_cache_read_keys : sparkv_cache_read_values;
      EXPECT_EQ(read(host.cache, l, cell, 1, row.data(), &host.error), SPARKV_OK);
      const std::vector<float> raw = Numbers(Content(7, t), keys ? kKeys : kValues, l, n);
      for (int j = 0; j < dim; ++j) {
        const size_t at = size_t(h * dim + j);
        const double weight = keys ? energy[size_t(j)] : 1.0, x = raw[at];
        const double off = x - double(HalfToFloat(row[at]));
        error += weight * off * off;
        square += weight * x * x;
      }
    }
    return std::sqrt(error / square);
  };
  return {relative(true), relative(false)};
}

class RowErrors : public testing::TestWithParam<const char*> {};

TEST_P(RowErrors, AreThoseOfRowsReadBack) {
  Model model;
  model.preset = GetParam();
  model.set = {{"window", "16"}, {"observe", "24"}, {"recent", "none"}};
  Host host(model);
  ASSERT_EQ(sparkv_cache_start_errors(host.cache, &host.error), SPARKV_OK) << host.error.text;
  host.Feed(0, 7, 0, kTokens, {64, 64, 31, 1});
  const int sinks = host.config.sinks;
  for (int l = 0; l < host.n_layers(); ++l) {
    for (int h = 0; h < host.layer(l).n_kv_heads; ++h) {
      const Errors said = Said(host, l, h), found = Found(host, l, h, sinks, kTokens - 16);
      EXPECT_GT(found.keys, 1e-4);
      EXPECT_NEAR(said.keys, found.keys, 1e-6 * found.keys) << "layer " << l << " head " << h;
      EXPECT_NEAR(said.values, found.values, 1e-6) << "layer " << l << " head " << h;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Presets, RowErrors,
                         testing::Values("tiers-6321", "tiers-4210", "spark-0.5-i5", "spark-0.8"));

// Errors of the steps are about independent: together they are what the oldest rows have lost.
TEST(RowErrors, OfStagesAddUp) {
  Model model;
  model.preset = "tiers-4210";
  model.set = {{"window", "8"}, {"observe", "24"}, {"recent", "16:i8+q8,48:t6321+t3"}};
  Host host(model);
  ASSERT_EQ(sparkv_cache_start_errors(host.cache, &host.error), SPARKV_OK) << host.error.text;
  host.Feed(0, 7, 0, kTokens, {64, 64, 31, 1});
  for (int l = 0; l < host.n_layers(); ++l) {
    for (int h = 0; h < host.layer(l).n_kv_heads; ++h) {
      const Errors said = Said(host, l, h),
                   found = Found(host, l, h, host.config.sinks, kTokens - 48);
      EXPECT_NEAR(said.keys, found.keys, .15 * found.keys) << "layer " << l << " head " << h;
      EXPECT_NEAR(said.values, found.values, .15 * found.values) << "layer " << l << " head " << h;
    }
  }
}

TEST(RowErrors, DoNotChangeAnyRow) {
  const auto answers = [](bool measure) {
    Model model;
    model.preset = "balanced";
    model.set = {{"window", "8"}, {"observe", "24"}, {"recent", "16:i8+q8,48:t7432+t4"}};
    Host host(model);
    if (measure) {
      EXPECT_EQ(sparkv_cache_start_errors(host.cache, &host.error), SPARKV_OK);
    }
    return host.Feed(0, 7, 0, kTokens, {64, 64, 31, 1});
  };
  EXPECT_EQ(answers(true), answers(false));
}

TEST(RowErrors, AreZeroWhereNothingIsLostAndRefusedWhereNothingIsMeasured) {
  Host host(Model{});
  double keys = 5.0, values = 5.0;
  EXPECT_EQ(sparkv_cache_errors(host.cache, 0, 0, &keys, &values, &host.error), SPARKV_INVALID);
  EXPECT_STREQ(host.error.text, "errors: not measured");
  EXPECT_EQ(keys, 5.0);
  ASSERT_EQ(sparkv_cache_start_errors(host.cache, &host.error), SPARKV_OK);
  host.Feed(0, 7, 0, kTokens, {64, 64, 31, 1});
  EXPECT_EQ(Said(host, 0, 1).keys, 0.0);
  EXPECT_EQ(Said(host, 0, 1).values, 0.0);
  EXPECT_EQ(sparkv_cache_errors(host.cache, 9, 0, &keys, &values, &host.error), SPARKV_INVALID);
  EXPECT_EQ(sparkv_cache_errors(host.cache, 0, 2, &keys, &values, &host.error), SPARKV_INVALID);
  EXPECT_STREQ(host.error.text, "kv_head: 2 is none of layer 0");
  EXPECT_EQ(sparkv_cache_errors(host.cache, 0, 0, nullptr, &values, &host.error), SPARKV_INVALID);
  Model other;
  other.set = {{"baseline", "kivi-2"}};
  Host baseline(other);
  EXPECT_EQ(sparkv_cache_start_errors(baseline.cache, &baseline.error), SPARKV_INVALID);
}

}  // namespace
}  // namespace sparkv::test

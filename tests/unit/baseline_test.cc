// Codecs of others (src/baselines) against slow renditions in double precision, and a cache that
// uses them.
#include "baselines/baseline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "baselines/ggml_rows.h"
#include "baselines/kivi.h"
#include "baselines/turboquant.h"
#include "cache_model.h"
#include "hard_rows.h"

namespace sparkv::test {
namespace {

constexpr const char* kNames[] = {"kivi-2",       "kivi-4",    "turboquant-2", "turboquant-3",
                                  "turboquant-4", "think-0.5", "mustafar-0.5", "q8_0-rows",
                                  "q5_1-rows",    "q4_0-rows"};

Baseline Named(const char* name) {
  Baseline baseline;
  EXPECT_TRUE(ParseBaseline(name, &baseline).ok()) << name;
  return baseline;
}

std::vector<float> Gaussian(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& number : x) number = HalfToFloat(FloatToHalf(normal(rng)));
  return x;
}

double Rounded(double x) { return HalfToFloat(FloatToHalf(float(x))); }

void ExpectNear(const std::vector<float>& got, const std::vector<double>& want, const char* what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 2e-5) << what << " " << i;
}

std::vector<double> SlowKiviGroup(int bits, const std::vector<double>& x) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  const double top = std::pow(2.0, bits) - 1, zero = Rounded(*low);
  const double scale = Rounded((*high - *low) / top);
  std::vector<double> out;
  for (const double number : x)
    out.push_back(std::clamp(std::nearbyint((number - zero) / scale), 0.0, top) * scale + zero);
  return out;
}

TEST(Baselines, KiviCodesKeysByChannelAndValuesByToken) {
  std::vector<float> hand = {0, 1, 2, 9};
  KiviValue(2, 4, hand.data());
  EXPECT_EQ(hand, (std::vector<float>{0, 0, 3, 9}));
  constexpr int kTokens = 32, kDim = 40;
  for (const int bits : {2, 4}) {
    const std::vector<float> x = Gaussian(kTokens * kDim, 1);
    std::vector<float> keys = x, value(x.begin(), x.begin() + kDim);
    std::vector<double> slow_keys(x.size()), slow_value;
    KiviKeys(bits, kTokens, kDim, keys.data());
    for (size_t j = 0; j < kDim; ++j) {
      std::vector<double> channel;
      for (size_t t = 0; t < kTokens; ++t) channel.push_back(x[t * kDim + j]);
      channel = SlowKiviGroup(bits, channel);
      for (size_t t = 0; t < kTokens; ++t) slow_keys[t * kDim + j] = channel[t];
    }
    ExpectNear(keys, slow_keys, "keys");
    KiviValue(bits, kDim, value.data());
    for (const auto& [from, to] : {std::pair(0, 32), std::pair(32, kDim)}) {
      for (const double number : SlowKiviGroup(bits, {x.begin() + from, x.begin() + to}))
        slow_value.push_back(number);
    }
    ExpectNear(value, slow_value, "value");
  }
}

// Entry (i, j) of an orthonormal Hadamard matrix of n rows.
double Hadamard(size_t i, size_t j, size_t n) {
  return (std::popcount(i & j) % 2 == 0 ? 1.0 : -1.0) / std::sqrt(double(n));
}

std::vector<double> SlowRotate(const std::vector<double>& x, size_t block) {
  std::vector<double> out(x.size(), 0.0);
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = 0; j < block; ++j)
      out[i] += Hadamard(i % block, j, block) * x[i / block * block + j];
  }
  return out;
}

// Lloyd's iteration on the unit normal distribution; the positive half.
std::vector<double> LloydMax(int bits) {
  const auto density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  const auto below = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  std::vector<double> levels(size_t(1) << (bits - 1));
  for (size_t i = 0; i < levels.size(); ++i)
    levels[i] = (double(i) + 0.5) * 2.5 / double(levels.size());
  for (int round = 0; round < 3000; ++round) {
    const std::vector<double> old = levels;
    for (size_t i = 0; i < levels.size(); ++i) {
      const double from = i == 0 ? 0.0 : (old[i - 1] + old[i]) / 2;
      const double to = i + 1 == old.size() ? 30.0 : (old[i] + old[i + 1]) / 2;
      levels[i] = (density(from) - density(to)) / (below(to) - below(from));
    }
  }
  return levels;
}

TEST(Baselines, TurboQuantIsALloydMaxQuantiserInARotatedBasis) {
  for (const int dim : {64, 96}) {
    for (const int bits : {2, 3, 4}) {
      std::vector<float> x = Gaussian(size_t(dim), 2);
      for (float& number : x) number *= 3.0f;
      std::vector<double> signs, y;
      uint64_t state = 0x5eed;
      for (int j = 0; j < dim; ++j) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        signs.push_back(state >> 63 != 0 ? -1.0 : 1.0);
        y.push_back(signs.back() * x[size_t(j)]);
      }
      const size_t block = size_t(dim & -dim);
      y = SlowRotate(y, block);
      const double norm =
          Rounded(std::sqrt(std::inner_product(y.begin(), y.end(), y.begin(), 0.0)));
      const std::vector<double> levels = LloydMax(bits);
      for (double& number : y) {
        const double unit = number / norm * std::sqrt(dim);
        double best = 1e9;
        for (const double level : levels) {
          for (const double signed_level : {level, -level}) {
            if (std::fabs(signed_level - unit) < std::fabs(best - unit)) best = signed_level;
          }
        }
        number = best * norm / std::sqrt(dim);
      }
      y = SlowRotate(y, block);
      for (size_t j = 0; j < y.size(); ++j) y[j] *= signs[j];
      TurboQuant(bits, dim, x.data());
      ExpectNear(x, y, "number");
    }
  }
}

std::vector<double> SlowGgml(Codec codec, size_t rotation, const std::vector<float>& x) {
  std::vector<double> y = SlowRotate({x.begin(), x.end()}, rotation);
  for (size_t b = 0; b < y.size(); b += 32) {
    double low = 1e9, high = -1e9, largest = 0.0;
    const size_t end = std::min(y.size(), b + 32);
    for (size_t j = b; j < end; ++j) {
      low = std::min(low, y[j]);
      high = std::max(high, y[j]);
      if (std::fabs(y[j]) > std::fabs(largest)) largest = y[j];
    }
    for (size_t j = b; j < end; ++j) {
      if (codec == Codec::kQ8_0) {
        const double d = std::fabs(largest) / 127;
        y[j] = std::round(y[j] / d) * Rounded(d);
      } else if (codec == Codec::kQ4_0) {
        const double d = largest / -8;
        y[j] = (std::min(15.0, std::floor(y[j] / d + 8.5)) - 8) * Rounded(d);
      } else {
        const double d = (high - low) / 31;
        y[j] = std::floor((y[j] - low) / d + 0.5) * Rounded(d) + Rounded(low);
      }
    }
  }
  return SlowRotate(y, rotation);
}

TEST(Baselines, RowsOfLlamaAreBlocksOf32InARotatedBasis) {
  std::vector<float> four(32), eight(32), five(32);
  four[0] = -8, four[1] = 7, four[2] = 3.4f;
  eight[0] = 127, eight[1] = -3.4f;
  five[0] = 31, five[2] = 12.6f;
  GgmlRow(Codec::kQ4_0, true, 32, four.data());
  GgmlRow(Codec::kQ8_0, true, 32, eight.data());
  GgmlRow(Codec::kQ5_1, true, 32, five.data());
  EXPECT_EQ(std::vector<float>(four.begin(), four.begin() + 4), (std::vector<float>{-8, 7, 3, 0}));
  EXPECT_EQ(std::vector<float>(eight.begin(), eight.begin() + 3), (std::vector<float>{127, -3, 0}));
  EXPECT_EQ(std::vector<float>(five.begin(), five.begin() + 3), (std::vector<float>{31, 0, 13}));
  struct Shape {
    int dim;
    bool key;
    size_t rotation;
  };
  for (const Shape& s : {Shape{64, true, 64}, Shape{128, true, 128}, Shape{128, false, 64},
                         Shape{192, true, 64}, Shape{80, true, 1}, Shape{40, false, 1}}) {
    for (const Codec codec : {Codec::kQ8_0, Codec::kQ5_1, Codec::kQ4_0}) {
      std::vector<float> x = Gaussian(size_t(s.dim), 3);
      const std::vector<double> slow = SlowGgml(codec, s.rotation, x);
      GgmlRow(codec, s.key, s.dim, x.data());
      ExpectNear(x, slow, "number");
    }
  }
}

TEST(Baselines, MustafarKeepsTheLargestOfEachRow) {
  std::vector<float> x = {1, -5, 2, 0.5f, 4, -2, 3, 0};
  CodeValue(Named("mustafar-0.5"), 8, x.data());
  EXPECT_EQ(x, (std::vector<float>{0, -5, 2, 0, 4, 0, 3, 0}));  // of equal ones the first
  for (const char* name : {"mustafar-0.3", "mustafar-0.8"}) {
    const std::vector<float> raw = Gaussian(80, 4);
    std::vector<size_t> order(80);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return std::fabs(raw[a]) > std::fabs(raw[b]); });
    std::vector<double> slow(80, 0.0);
    for (size_t i = 0; i < size_t(80 - int(Named(name).ratio * 80)); ++i)
      slow[order[i]] = raw[order[i]];
    x = raw;
    CodeKeys(Named(name), nullptr, 1, 80, x.data());
    ExpectNear(x, slow, name);
  }
}

TEST(Baselines, BitsCountScalesMasksAndNorms) {
  struct Case {
    const char* name;
    int dim;
    double keys, values;
  };
  for (const Case& c : {Case{"kivi-2", 64, 3, 3}, Case{"kivi-4", 128, 5, 5},
                        Case{"kivi-2", 80, 3, 3.2}, Case{"turboquant-2", 128, 2.125, 2.125},
                        Case{"turboquant-3", 64, 3.25, 3.25}, Case{"turboquant-4", 64, 4.25, 4.25},
                        Case{"think-0.5", 64, 8, 16}, Case{"think-0.8", 64, 3.25, 16},
                        Case{"mustafar-0.5", 64, 9, 9}, Case{"mustafar-0", 64, 17, 17},
                        Case{"q8_0-rows", 64, 8.5, 8.5}, Case{"q5_1-rows", 64, 6, 6},
                        Case{"q4_0-rows", 64, 4.5, 4.5}, Case{"q4_0-rows", 80, 4.6, 4.6}}) {
    EXPECT_DOUBLE_EQ(KeyBits(Named(c.name), c.dim), c.keys) << c.name;
    EXPECT_DOUBLE_EQ(ValueBits(Named(c.name), c.dim), c.values) << c.name;
  }
}

TEST(Baselines, ErrorFallsWithBits) {
  const auto error = [](const char* name, bool keys) {
    constexpr int kTokens = 32, kDim = 64;
    const std::vector<float> raw = Gaussian(kTokens * kDim, 5);
    std::vector<float> x = raw;
    const Baseline baseline = Named(name);
    const int block = keys ? KeyBlock(baseline) : 1;
    for (int t = 0; t < kTokens; t += block) {
      if (keys)
        CodeKeys(baseline, nullptr, block, kDim, x.data() + t * kDim);
      else
        CodeValue(baseline, kDim, x.data() + t * kDim);
    }
    double sum = 0.0, energy = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
      sum += std::pow(double(x[i]) - double(raw[i]), 2);
      energy += std::pow(double(raw[i]), 2);
    }
    return sum / energy;
  };
  for (const std::vector<const char*>& family :
       {std::vector<const char*>{"kivi-2", "kivi-4"},
        {"turboquant-2", "turboquant-3", "turboquant-4"},
        {"mustafar-0.8", "mustafar-0.5", "mustafar-0.2", "mustafar-0"},
        {"q4_0-rows", "q5_1-rows", "q8_0-rows"}}) {
    for (const bool keys : {true, false}) {
      for (size_t i = 1; i < family.size(); ++i)
        EXPECT_LT(error(family[i], keys), 0.5 * error(family[i - 1], keys)) << family[i];
    }
  }
  // What the best quantiser of a normal number loses; the norm of a row of 64 is known beside it.
  for (const auto& [name, loss] :
       {std::pair("turboquant-2", 0.1175), std::pair("turboquant-3", 0.03454),
        std::pair("turboquant-4", 0.009501)}) {
    EXPECT_GT(error(name, true), 0.9 * loss) << name;
    EXPECT_LT(error(name, true), 1.02 * loss) << name;
  }
  EXPECT_EQ(error("mustafar-0", true), 0.0);
}

TEST(Baselines, HardRowsComeBackAsNumbers) {
  std::mt19937 rng(6);
  for (const char* name : kNames) {
    for (const int dim : kHeadDims) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const int n = KeyBlock(Named(name));
        std::vector<float> k, v;
        for (int t = 0; t < n; ++t) {
          for (const uint16_t half : HardRow(dim, kind, rng)) k.push_back(HalfToFloat(half));
        }
        v.assign(k.begin(), k.begin() + dim);
        const std::vector<float> raw = k;
        CodeKeys(Named(name), nullptr, n, dim, k.data());
        CodeValue(Named(name), dim, v.data());
        for (size_t i = 0; i < k.size(); ++i) {
          ASSERT_TRUE(std::isfinite(k[i])) << name << " " << dim << " kind " << kind;
          // All zero, and one value only, where groups along tokens have no range.
          const bool known = kind == 6 || (kind == 7 && n > 1);
          ASSERT_EQ(k[i], known ? raw[i] : k[i]) << name;
        }
        for (const float x : v) ASSERT_TRUE(std::isfinite(x)) << name << " " << dim << " " << kind;
      }
    }
  }
}

// ---- in a cache ----

Model With(const char* baseline) {
  Model model;
  model.set = {{"window", "16"}, {"observe", "24"}, {"baseline", baseline}};
  return model;
}

TEST(Baselines, AKiviBlockIsSealedWholeAndLastWhenItHasLeftTheWindow) {
  Host host(With("kivi-2"));
  for (int n = 1; n <= 150; ++n) {
    host.Feed(0, 1, n - 1, 1, {1});
    ASSERT_EQ(host.Memory().sealed, std::max(0, n - 1 - 16 - 4 + 1) / 32 * 32) << n;
  }
  for (int token = 0; token < 150; ++token) {
    const bool sealed = token >= 4 && token < 4 + 128;
    ASSERT_EQ(host.Rows(token) == host.RawRows(Content(1, token)), !sealed) << token;
  }
  // Ranks 36 to 67 of layer 1: one block.
  std::vector<float> k;
  for (int token = 36; token < 68; ++token) {
    const std::vector<float> row = Numbers(Content(1, token), kKeys, 1, 64);
    k.insert(k.end(), row.begin(), row.end());
  }
  KiviKeys(2, 32, 64, k.data());
  EXPECT_EQ(host.Read(kKeys, 1, 36, 32), Halves(k));
}

TEST(Baselines, ThinkPrunesTheSameChannelsOfAllKeys) {
  Host host(With("think-0.5"));
  host.Feed(0, 1, 0, 100, {40});
  for (int l = 0; l < host.n_layers(); ++l) {
    const Layer& layer = host.layer(l);
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      std::vector<double> q2(size_t(layer.k_dim), 0.0), k2 = q2;
      for (int token = 0; token < 24; ++token) {
        const std::vector<float> q = Numbers(Content(1, token), kQueries, l, layer.q_row());
        const std::vector<float> k = Numbers(Content(1, token), kKeys, l, layer.k_row());
        for (int j = 0; j < layer.k_dim; ++j) {
          for (int g = 0; g < layer.group; ++g)
            q2[size_t(j)] += std::pow(q[size_t((h * layer.group + g) * layer.k_dim + j)], 2);
          if (token >= 4) k2[size_t(j)] += std::pow(k[size_t(h * layer.k_dim + j)], 2);
        }
      }
      std::vector<double> score;
      for (size_t j = 0; j < q2.size(); ++j) score.push_back(q2[j] * k2[j]);
      std::vector<double> sorted = score;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (int token = 4; token < 80; ++token) {
        const std::vector<uint16_t> row = host.Read(kKeys, l, token, 1);
        const std::vector<float> raw = Numbers(Content(1, token), kKeys, l, layer.k_row());
        for (int j = 0; j < layer.k_dim; ++j) {
          const size_t at = size_t(h * layer.k_dim + j);
          const bool kept = score[size_t(j)] >= sorted[size_t(layer.k_dim / 2 - 1)];
          ASSERT_EQ(HalfToFloat(row[at]), kept ? raw[at] : 0.0f) << l << " " << h << " " << j;
        }
      }
      EXPECT_EQ(host.Read(kValues, l, 10, 1),
                Halves(Numbers(Content(1, 10), kValues, l, layer.v_row())));
    }
  }
}

TEST(Baselines, MemoryTellsTheBitsOfTheCodecAndTheBytesOfTheRows) {
  Host host(With("kivi-2"));
  host.Feed(0, 1, 0, 150, {50});
  const sparkv_memory m = host.Memory();
  EXPECT_DOUBLE_EQ(m.key_bits, (128 * 3 + 22 * 16) / 150.0);
  // 80 numbers in heads of 40, whose second group is short, and 32 in one group.
  EXPECT_DOUBLE_EQ(m.value_bits, (128 * (80 * 3.6 + 32 * 3) / 112 + 22 * 16) / 150.0);
  EXPECT_DOUBLE_EQ(m.bits, (m.key_bits * 128 + m.value_bits * 112) / 240);
  EXPECT_GE(m.resident, m.f16_bytes);

  Host think(With("think-0.5"));
  think.Feed(0, 1, 0, 150, {50});
  const int64_t sealed = think.Memory().sealed;
  EXPECT_EQ(sealed, 130);
  EXPECT_DOUBLE_EQ(think.Memory().key_bits, (130 * 8 + 20 * 16 + 1) / 150.0);
  EXPECT_DOUBLE_EQ(think.Memory().value_bits, 16.0);
}

TEST(Baselines, NamesAndCombinationsAreChecked) {
  sparkv_config config = MakeConfig(With("kivi-2"));
  sparkv_error error{};
  const sparkv_config before = config;
  for (const char* name :
       {"kivi", "kivi-3", "kivi-2 ", "turboquant-5", "think-", "think-1.5", "think-nan",
        "mustafar-x", "q8_0", "Kivi-2", "mustafar-0.00000000000000000000000000001"}) {
    EXPECT_EQ(sparkv_config_set(&config, "baseline", name, &error), SPARKV_INVALID) << name;
    EXPECT_EQ(std::string(error.text).find("baseline: \"" + std::string(name).substr(0, 20)), 0u)
        << error.text;
  }
  EXPECT_EQ(std::memcmp(&before, &config, sizeof(config)), 0);
  char text[256];
  sparkv_config_text(&config, text, sizeof(text));
  EXPECT_NE(std::string(text).find(" baseline kivi-2"), std::string::npos);

  const sparkv_layer_shape layer{1, 32, 32};
  const sparkv_shape shape{sizeof(shape), 1, &layer, 16, 1, nullptr, 0};
  sparkv_cache* cache = nullptr;
  for (const auto& [key, value] :
       {std::pair("ratio", "0.5"), std::pair("kept", "i8"), std::pair("values", "q8"),
        std::pair("layers", "0=spark-0-i8"), std::pair("budget", "8bpe"),
        std::pair("protect", "first:1"), std::pair("evict", "streamingllm:64"),
        std::pair("recent", "64:i8+q8")}) {
    config = before;
    ASSERT_EQ(sparkv_config_set(&config, key, value, &error), SPARKV_OK) << error.text;
    EXPECT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_INVALID) << key;
    EXPECT_EQ(cache, nullptr);
    for (const char* part : {"baseline: \"kivi-2\"", key, value})
      EXPECT_NE(std::string(error.text).find(part), std::string::npos) << error.text;
  }
  config = before;
  std::memset(config.baseline, 'k', sizeof(config.baseline));
  EXPECT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_INVALID);
  config = before;
  ASSERT_EQ(sparkv_config_set(&config, "baseline", "", &error), SPARKV_OK);
  EXPECT_EQ(config.baseline[0], '\0');
}

}  // namespace
}  // namespace sparkv::test

// Calibrations: what is measured, what it changes, and what is refused.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "base/checksum.h"
#include "cache/calibration.h"
#include "cache_model.h"

namespace sparkv::test {
namespace {

Model Small(const char* preset = "tiers-6321") {
  Model model;
  model.preset = preset;
  model.set = {{"window", "16"}, {"observe", "24"}, {"recent", "none"}};
  return model;
}

using Bytes = std::vector<uint8_t>;

Bytes Measured(const Model& model, int tokens = 120, std::vector<int> cuts = {40, 40, 40}) {
  Host host(model);
  EXPECT_EQ(sparkv_cache_start_calibration(host.cache, &host.error), SPARKV_OK);
  host.Feed(0, 7, 0, tokens, cuts);
  Bytes bytes(sparkv_cache_save_calibration(host.cache, nullptr, 0));
  EXPECT_EQ(sparkv_cache_save_calibration(host.cache, bytes.data(), bytes.size()), bytes.size());
  return bytes;
}

sparkv_status Load(Host& host, const Bytes& bytes) {
  host.error = {};
  return sparkv_cache_load_calibration(host.cache, bytes.data(), bytes.size(), &host.error);
}

Bytes Of(const Calibration& calibration) {
  const std::string bytes = CalibrationBytes(calibration);
  return {bytes.begin(), bytes.end()};
}

Calibration Parsed(const Bytes& bytes) {
  Calibration calibration;
  const Status s = ReadCalibration(bytes.data(), bytes.size(), &calibration);
  EXPECT_TRUE(s.ok()) << s.text;
  return calibration;
}

TEST(Calibration, HoldsTheMeanSquaresOfWhatTheCacheSaw) {
  const Model model = Small();
  const Calibration measured = Parsed(Measured(model));
  ASSERT_EQ(measured.layers.size(), model.layers.size());
  const int sinks = MakeConfig(model).sinks;
  for (size_t l = 0; l < model.layers.size(); ++l) {
    const Layer& layer = model.layers[l];
    const LayerEnergies& energies = measured.layers[l];
    ASSERT_EQ(energies.number, int(l));
    ASSERT_EQ(energies.n_kv_heads, layer.n_kv_heads);
    ASSERT_EQ(energies.k_dim, layer.k_dim);
    for (int h = 0; h < layer.n_kv_heads; ++h) {
      for (int j = 0; j < layer.k_dim; ++j) {
        double keys = 0.0, queries = 0.0;
        for (int t = sinks; t < 120; ++t) {
          const double k =
              Numbers(Content(7, t), kKeys, int(l), layer.k_row())[size_t(h * layer.k_dim + j)];
          keys += k * k;
          const std::vector<float> q = Numbers(Content(7, t), kQueries, int(l), layer.q_row());
          for (int g = 0; g < layer.group; ++g) {
            const double x = q[size_t((h * layer.group + g) * layer.k_dim + j)];
            queries += x * x / layer.group;
          }
        }
        const size_t at = size_t(h * layer.k_dim + j);
        ASSERT_NEAR(energies.keys[at], keys / (120 - sinks), 1e-4 * keys) << l << " " << at;
        ASSERT_NEAR(energies.queries[at], queries / (120 - sinks), 1e-4 * queries)
            << l << " " << at;
      }
    }
  }
}

TEST(Calibration, DoesNotDependOnHowAPromptIsCut) {
  const Calibration a = Parsed(Measured(Small(), 120, {120}));
  const Calibration b = Parsed(Measured(Small(), 120, {1, 50, 69}));
  for (size_t l = 0; l < a.layers.size(); ++l) {
    for (size_t j = 0; j < a.layers[l].size(); ++j)
      ASSERT_FLOAT_EQ(a.layers[l].keys[j], b.layers[l].keys[j]);
  }
}

TEST(Calibration, ReadsNoQueriesBeyondThoseOfACall) {
  Model model = Small();
  model.streams = 2;
  model.split = true;
  Host host(model);
  ASSERT_EQ(sparkv_cache_start_calibration(host.cache, &host.error), SPARKV_OK);
  for (int p = 0; p < 20; p += 2) {
    const auto step = host.Begin(
        {{0, Content(0, p)}, {0, Content(0, p + 1)}, {1, Content(1, p)}, {1, Content(1, p + 1)}});
    for (int l = 0; l < host.n_layers(); ++l) {
      ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
      ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
      for (int s = 0; s < 2; ++s) {
        std::vector<float> out;
        ASSERT_EQ(host.Attend(OneStream(step, s), l, &out), SPARKV_OK) << host.error.text;
      }
    }
  }
  EXPECT_EQ(sparkv_cache_save_calibration(host.cache, nullptr, 0), 664u);  // no layer was measured
}

class Calibrated : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Presets, Calibrated,
                         testing::Values("tiers-6321", "spark-0.5-i5", "balanced"));

TEST_P(Calibrated, RowsAreTheSameHoweverAPromptIsCutAndWhoElseIsThere) {
  Model model = Small(GetParam());
  if (GetParam() == std::string("balanced")) model.set[2] = {"recent", "40:i8+q8,64:t7432+t4"};
  const Bytes bytes = Measured(model);
  Host one(model), cut(model), crowded(model);
  for (Host* host : {&one, &cut, &crowded}) ASSERT_EQ(Load(*host, bytes), SPARKV_OK);
  crowded.Feed(1, 9, 0, 50, {50});
  const std::vector<Answer> whole = one.Feed(0, 1, 0, 110, {110});
  EXPECT_TRUE(Near(cut.Feed(0, 1, 0, 110, {1, 30, 7, 72}), whole, kSums));
  EXPECT_TRUE(Near(crowded.Feed(0, 1, 0, 110, {55, 55}), whole, kSums));
  for (int64_t i = 0; i < 110; ++i) {
    ASSERT_EQ(one.Rows(i), cut.Rows(i)) << i;
    ASSERT_EQ(one.Rows(i), crowded.Rows(crowded.sequence(0)[size_t(i)].cell)) << i;
  }
}

TEST_P(Calibrated, ASlotIsRestoredInAnotherProcessWithoutAFileOfWeights) {
  const Model model = Small(GetParam());
  const Bytes bytes = Measured(model);
  Host usual(model), other(model);
  ASSERT_EQ(Load(usual, bytes), SPARKV_OK);
  ASSERT_EQ(Load(other, bytes), SPARKV_OK);
  usual.Feed(0, 1, 0, 100, {100});
  for (int l = 0; l < usual.n_layers(); ++l) {
    for (const bool keys : {true, false}) {
      std::vector<uint16_t> rows(100 * (keys ? usual.layer(l).k_row() : usual.layer(l).v_row()));
      const auto read = keys ? sparkv_cache_read_keys : sparkv_cache_read_values;
      const auto restore = keys ? sparkv_cache_restore_keys : sparkv_cache_restore_values;
      ASSERT_EQ(read(usual.cache, l, 0, 100, rows.data(), &usual.error), SPARKV_OK);
      ASSERT_EQ(restore(other.cache, l, 0, 100, rows.data(), &other.error), SPARKV_OK);
    }
  }
  for (int64_t i = 0; i < 100; ++i) ASSERT_EQ(usual.Rows(i), other.Rows(i)) << i;
  EXPECT_EQ(sparkv_cache_unknown_rows(other.cache), 0);
  EXPECT_EQ(other.Memory().sealed, usual.Memory().sealed);
}

TEST(Calibration, PacksBeforeTheFirstQueriesOfAPromptAreAllThereAndAfterAClear) {
  Model model = Small();
  model.set[1] = {"observe", "80"};
  Host plain(model), calibrated(model);
  ASSERT_EQ(Load(calibrated, Measured(model)), SPARKV_OK);
  plain.Feed(0, 1, 0, 60, {60});
  calibrated.Feed(0, 1, 0, 60, {60});
  EXPECT_EQ(plain.Memory().sealed, 0);
  const int64_t sealed = calibrated.Memory().sealed;
  EXPECT_GT(sealed, 0);
  const auto rows = calibrated.Rows(20);
  sparkv_cache_clear(calibrated.cache);
  EXPECT_EQ(calibrated.Memory().tokens, 0);
  calibrated.Feed(1, 1, 0, 60, {60});
  EXPECT_EQ(calibrated.Memory().sealed, sealed);
  EXPECT_EQ(calibrated.Rows(calibrated.sequence(1)[20].cell), rows);
}

TEST(Calibration, OfAnotherModelIsRefusedOnceTheTokensTell) {
  const Model model = Small();
  Calibration other = Parsed(Measured(model));
  other.model = "another";
  for (LayerEnergies& layer : other.layers) {
    std::reverse(layer.queries.begin(), layer.queries.end());
    std::reverse(layer.keys.begin(), layer.keys.end());
  }
  Host host(model);
  ASSERT_EQ(Load(host, Of(other)), SPARKV_OK);
  Batch batch;
  for (int t = 0; t < 60; ++t) batch.emplace_back(0, Content(1, t));
  for (int again = 0; again < 2; ++again) {
    const auto step = host.Begin(batch);
    sparkv_status status = SPARKV_OK;
    for (int l = 0; l < host.n_layers() && status == SPARKV_OK; ++l) {
      ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
      ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
      std::vector<float> out;
      status = host.Attend(step, l, &out);
    }
    EXPECT_EQ(status, SPARKV_INVALID);
    EXPECT_NE(std::strstr(host.error.text, "made for another model, \"another\""), nullptr)
        << host.error.text;
  }
}

TEST(Calibration, OfAnotherShapeIsRefusedByName) {
  Model wider = Small();
  wider.layers[1].k_dim = 128;
  Host host(Small());
  EXPECT_EQ(Load(host, Measured(wider)), SPARKV_INVALID);
  EXPECT_NE(std::strstr(host.error.text, "layer 1 has 1 x 128 key channels, not 1 x 64"), nullptr)
      << host.error.text;
  Model fewer = Small();
  fewer.layers.pop_back();
  EXPECT_EQ(Load(host, Measured(fewer)), SPARKV_INVALID);
  EXPECT_NE(std::strstr(host.error.text, "without layer 1"), nullptr) << host.error.text;
}

TEST(Calibration, ComesBeforeAllElseAndOnce) {
  const Bytes bytes = Measured(Small());
  Host used(Small()), twice(Small());
  used.Feed(0, 1, 0, 5, {5});
  EXPECT_EQ(Load(used, bytes), SPARKV_INVALID);
  EXPECT_EQ(Load(twice, bytes), SPARKV_OK);
  EXPECT_EQ(Load(twice, bytes), SPARKV_INVALID);
}

TEST(Calibration, TakesNothingFromHostileBytes) {
  const Bytes good = Measured(Small());
  Host host(Small());
  const auto refused = [&](const Bytes& bytes, const char* field) {
    EXPECT_EQ(Load(host, bytes), SPARKV_CORRUPT);
    EXPECT_NE(std::strstr(host.error.text, field), nullptr) << host.error.text;
    EXPECT_EQ(std::strchr(host.error.text, '\n'), nullptr);
  };
  for (size_t n = 0; n < good.size(); n += n < 700 ? 1 : 37) {
    Bytes cut(good.begin(), good.begin() + long(n));
    cut.reserve(1);  // never NULL
    refused(cut, "calibration");
  }
  std::mt19937 rng(1);
  for (size_t i = 0; i < good.size(); ++i) {
    Bytes bad = good;
    bad[i] ^= uint8_t(1u << (rng() % 8));
    refused(bad, "calibration");
  }
  // Bytes that an adversary has given a good checksum.
  const auto with = [&](size_t at, auto number) {
    Bytes bad = good;
    std::memcpy(&bad[at], &number, sizeof(number));
    const uint64_t checksum = Fnv1a(&bad[16], bad.size() - 16);
    std::memcpy(&bad[8], &checksum, sizeof(checksum));
    return bad;
  };
  refused(with(656, uint32_t{0}), "layers: 0");
  refused(with(656, uint32_t{3}), "layers[2]");
  refused(with(656, uint32_t{1}), "bytes too many");
  refused(with(656, uint32_t{0xffffffff}), "layers: 4294967295");
  refused(with(664, int32_t{-1}), "number: -1");
  refused(with(664, int32_t{1}), "number: 1");  // the second layer's
  refused(with(668, int32_t{1 << 30}), "n_kv_heads");
  refused(with(672, int32_t{33}), "k_dim: 33");
  refused(with(680, std::numeric_limits<float>::quiet_NaN()), "layers[0]");
  refused(with(680, -1.0f), "layers[0]");
  refused(with(144, '7'), "sensitivity");
  EXPECT_EQ(Load(host, good), SPARKV_OK);
}

TEST(Calibration, EnergiesOfZeroAndOfAnySizeGiveFiniteAnswers) {
  Calibration odd = Parsed(Measured(Small()));
  for (LayerEnergies& layer : odd.layers) {
    for (size_t j = 0; j < layer.size(); ++j) {
      layer.queries[j] = j % 3 == 0 ? 0.0f : layer.queries[j] * 1e-20f;
      layer.keys[j] *= 1e20f;
    }
  }
  for (const char* preset : {"tiers-6321", "spark-0.8"}) {
    Host host(Small(preset));
    ASSERT_EQ(Load(host, Of(odd)), SPARKV_OK) << host.error.text;
    for (const Answer& answer : host.Feed(0, 1, 0, 31, {31})) {
      for (const float x : answer) ASSERT_TRUE(std::isfinite(x));
    }
  }
}

TEST(Calibration, SpendsTheSameBytesWhereTheyCount) {
  Calibration calibration = Parsed(Measured(Small()));
  calibration.sensitivity = "0:0.1,1:5";
  const Bytes bytes = Of(calibration);
  const auto applied = [&](const char* preset, const char* key, const char* value) {
    Model model = Small(preset);
    if (key != nullptr) model.set.emplace_back(key, value);
    sparkv_config config = MakeConfig(model);
    sparkv_error error{};
    EXPECT_EQ(sparkv_config_calibration(&config, bytes.data(), bytes.size(), &error), SPARKV_OK)
        << error.text;
    return config;
  };
  EXPECT_STREQ(applied("safe", nullptr, nullptr).budget, "auto");
  EXPECT_STREQ(applied("balanced", "layers", "none").budget, "auto");
  // A preset keeps its own middle.
  EXPECT_STREQ(applied("balanced", nullptr, nullptr).budget, "");
  EXPECT_STREQ(applied("balanced", nullptr, nullptr).layers, MakeConfig(Small("balanced")).layers);
  EXPECT_STREQ(applied("balanced", nullptr, nullptr).sensitivity, "0:0.1,1:5");
  EXPECT_STREQ(applied("balanced", "budget", "4bpe").budget, "4bpe");
  EXPECT_STREQ(applied("balanced", "layers", "0=exact").budget, "");
  EXPECT_STREQ(applied("balanced", "sensitivity", "1:3").sensitivity, "1:3");
  // Rows that were asked for by name stay what they are.
  EXPECT_STREQ(applied("spark-0.5-i5", nullptr, nullptr).budget, "");
  EXPECT_STREQ(applied("exact", nullptr, nullptr).budget, "");
}

TEST(Calibration, PartsAreJoinedAndNamed) {
  Calibration whole = Parsed(Measured(Small()));
  Calibration first = whole, second = whole;
  first.layers.pop_back();
  second.layers.erase(second.layers.begin());
  const Bytes a = Of(first), b = Of(second);
  const void* parts[] = {a.data(), b.data()};
  const size_t sizes[] = {a.size(), b.size()};
  sparkv_error error{};
  size_t size = 0;
  ASSERT_EQ(sparkv_calibration_join(parts, sizes, 2, "name", "0:2", nullptr, &size, &error),
            SPARKV_OK);
  Bytes joined(size);
  ASSERT_EQ(sparkv_calibration_join(parts, sizes, 2, "name", "0:2", joined.data(), &size, &error),
            SPARKV_OK);
  whole.model = "name";
  whole.sensitivity = "0:2";
  EXPECT_EQ(joined, Of(whole));
  char name[128];
  ASSERT_EQ(sparkv_calibration_model(joined.data(), joined.size(), name, &error), SPARKV_OK);
  EXPECT_STREQ(name, "name");
  const void* twice[] = {a.data(), a.data()};
  const size_t twice_sizes[] = {a.size(), a.size()};
  EXPECT_EQ(sparkv_calibration_join(twice, twice_sizes, 2, "", "", nullptr, &size, &error),
            SPARKV_CORRUPT);
  EXPECT_EQ(sparkv_calibration_join(parts, sizes, 2, std::string(200, 'x').c_str(), "", nullptr,
                                    &size, &error),
            SPARKV_INVALID);
  EXPECT_EQ(sparkv_calibration_join(parts, sizes, 2, "", "0:x", nullptr, &size, &error),
            SPARKV_CORRUPT);
}

TEST(Calibration, LikenessIsOneOfTheSameAndLowOfOthers) {
  std::vector<float> a(64), b(64), flat(64, 3.0f);
  for (size_t j = 0; j < a.size(); ++j) {
    a[j] = std::exp(Noise(j));
    b[j] = std::exp(Noise(j + 1000));
  }
  EXPECT_NEAR(LikenessOf(a.data(), a.data(), 2, 32), 1.0, 1e-9);
  EXPECT_LT(std::fabs(LikenessOf(a.data(), b.data(), 1, 64)), 0.3);
  EXPECT_EQ(LikenessOf(a.data(), flat.data(), 1, 64), 1.0);  // tells nothing
}

}  // namespace
}  // namespace sparkv::test

// Budgets: what sparkv_config_budget chooses takes no more than was asked, and little less.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "sparkv/sparkv.h"

namespace {

struct Solved {
  sparkv_status status = SPARKV_OK;
  sparkv_config config = {};
  std::string error;
};

sparkv_config Config(std::initializer_list<std::pair<const char*, const char*>> settings,
                     const char* preset = "") {
  sparkv_config config = {};
  config.struct_size = sizeof(config);
  sparkv_error error = {};
  EXPECT_EQ(sparkv_config_preset(&config, preset, &error), SPARKV_OK) << error.text;
  for (const auto& [key, value] : settings)
    EXPECT_EQ(sparkv_config_set(&config, key, value, &error), SPARKV_OK) << error.text;
  return config;
}

// Layers of `heads` heads of 64, as SmolLM2 has.
sparkv_shape Shape(const std::vector<sparkv_layer_shape>& layers, int64_t cells = 4096,
                   int32_t streams = 1, const int32_t* numbers = nullptr) {
  sparkv_shape shape = {};
  shape.struct_size = sizeof(shape);
  shape.n_layers = int32_t(layers.size());
  shape.layers = layers.data();
  shape.cells_per_stream = cells;
  shape.n_streams = streams;
  shape.layer_numbers = numbers;
  return shape;
}

Solved Solve(const sparkv_config& config, const std::vector<sparkv_shape>& shapes) {
  Solved solved;
  sparkv_error error = {};
  solved.config.struct_size = sizeof(sparkv_config);
  solved.status =
      sparkv_config_budget(&config, shapes.data(), int32_t(shapes.size()), &solved.config, &error);
  solved.error = error.text;
  return solved;
}

// Bytes of full caches, counted from the rows of each layer.
double Bytes(const sparkv_config& config, const std::vector<sparkv_shape>& shapes, int n_layers) {
  double bytes = 0;
  for (const sparkv_shape& shape : shapes) {
    for (int32_t i = 0; i < shape.n_layers; ++i) {
      const sparkv_layer_shape& s = shape.layers[i];
      sparkv_config rows = {};
      rows.struct_size = sizeof(rows);
      sparkv_error error = {};
      const int32_t number = shape.layer_numbers ? shape.layer_numbers[i] : i;
      EXPECT_EQ(sparkv_config_layer(&config, number, n_layers, &rows, &error), SPARKV_OK);
      const auto newest = [&](int64_t tokens) {
        return double(std::min(shape.cells_per_stream, config.sinks + tokens));
      };
      const double key = double(sparkv_key_row_bytes(&rows, s.k_dim)),
                   value = double(sparkv_value_row_bytes(&rows, s.v_dim));
      double stay = newest(config.window), head = stay * 2.0 * (s.k_dim + s.v_dim);
      sparkv_config recent = {};
      recent.struct_size = sizeof(recent);
      int32_t until = 0;
      for (int32_t k = 0; sparkv_config_recent(&config, k, &until, &recent, nullptr) == SPARKV_OK;
           ++k) {
        // Keys without weights do not get tiers on their way.
        const double own = recent.kept >= SPARKV_TIERS_7543 && rows.kept < SPARKV_TIERS_7543
                               ? key
                               : double(sparkv_key_row_bytes(&recent, s.k_dim));
        head += (newest(until) - stay) *
                (std::max(key, own) +
                 std::max(value, double(sparkv_value_row_bytes(&recent, s.v_dim))));
        stay = newest(until);
      }
      const bool weights =
          rows.kept >= SPARKV_TIERS_7543 || (rows.ratio > 0 && int(rows.ratio * s.k_dim) > 0);
      bytes += shape.n_streams * s.n_kv_heads *
               (head + (double(shape.cells_per_stream) - stay) * (key + value) +
                (weights ? 2.0 * s.k_dim : 0.0));
    }
  }
  return bytes;
}

const std::vector<sparkv_layer_shape> kSmol(30, {3, 64, 64});
constexpr double kElements = 4096.0 * 30 * 3 * 128;

// Key and value of a token in one head of a layer.
size_t RowBytes(const sparkv_config& config, int layer) {
  sparkv_config rows = {};
  rows.struct_size = sizeof(rows);
  EXPECT_EQ(sparkv_config_layer(&config, layer, 30, &rows, nullptr), SPARKV_OK);
  return sparkv_key_row_bytes(&rows, 64) + sparkv_value_row_bytes(&rows, 64);
}

TEST(Budget, IsSpentAndNotExceeded) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol)};
  for (const double bits : {3.1, 3.5, 4.0, 4.57, 5.25, 6.0, 7.3, 8.5, 12.0, 16.0}) {
    const std::string text = std::to_string(bits) + "bpe";
    const Solved solved = Solve(Config({{"budget", text.c_str()}}), shapes);
    ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
    EXPECT_STREQ(solved.config.budget, "");
    const double got = 8 * Bytes(solved.config, shapes, 30) / kElements;
    EXPECT_LE(got, bits + 1e-9) << solved.config.layers;
    EXPECT_GT(got, bits - 0.1) << solved.config.layers;
  }
  // Stages that are too much are given up, the oldest first.
  const auto recent = [&](const char* preset, const char* budget) {
    return std::string(Solve(Config({{"budget", budget}}, preset), shapes).config.recent);
  };
  EXPECT_EQ(recent("balanced", "3.1bpe"), "831:t7543+t4");
  EXPECT_EQ(recent("balanced", "2.3bpe"), "");
  EXPECT_EQ(recent("small", "2.4bpe"), "271:t7543+t4,1391:t5321+t2");
  EXPECT_EQ(recent("small", "2.1bpe"), "271:t7543+t4");
  const Solved all = Solve(Config({{"budget", "17bpe"}}), shapes);
  EXPECT_STREQ(all.config.layers, "0-29=spark-0+f16");
  const Solved bytes = Solve(Config({{"budget", "26.5MiB"}}), shapes);
  EXPECT_LE(Bytes(bytes.config, shapes, 30), 26.5 * 1048576);
  EXPECT_GT(Bytes(bytes.config, shapes, 30), 26.0 * 1048576);
}

TEST(Budget, AutoTakesWhatTheConfigurationWouldTake) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol, 4096, 2)};
  const double preset = Bytes(Config({}), shapes, 30);
  const Solved solved =
      Solve(Config({{"budget", "auto"}, {"sensitivity", "0-9:0.1,15-24:7"}}), shapes);
  ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
  EXPECT_LE(Bytes(solved.config, shapes, 30), preset);
  EXPECT_GT(Bytes(solved.config, shapes, 30), 0.98 * preset);
}

TEST(Budget, LayersThatLoseMoreGetMore) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol)};
  const Solved solved = Solve(
      Config({{"budget", "4.5bpe"}, {"sensitivity", "0-14:0.2,15-19:9,20-29:0.2,29:0"}}), shapes);
  ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
  const auto bytes = [&](int layer) { return RowBytes(solved.config, layer); };
  EXPECT_GT(bytes(16), bytes(0));
  EXPECT_GT(bytes(0), bytes(29));
}

// Where no sensitivities are given, the middle of a model counts for more; layers of a preset are
// not in the way of a budget.
TEST(Budget, TheMiddleGetsMoreWhereNothingIsKnown) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol)};
  for (const char* budget : {"3bpe", "3.5bpe", "4.5bpe"}) {
    const Solved solved = Solve(Config({{"budget", budget}}), shapes);
    ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
    EXPECT_EQ(std::string(solved.config.layers).find("middle"), std::string::npos);
    const auto bytes = [&](int layer) { return RowBytes(solved.config, layer); };
    EXPECT_GT(bytes(18), bytes(5)) << budget;
    EXPECT_GT(bytes(18), bytes(25)) << budget;
  }
}

TEST(Budget, LayersWithSettingsOfTheirOwnKeepThem) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol)};
  const Solved solved = Solve(
      Config({{"budget", "5bpe"}, {"layers", "7=spark-0.5-i4"}, {"protect", "first:2,last:1"}}),
      shapes);
  ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
  sparkv_config rows = {};
  rows.struct_size = sizeof(rows);
  ASSERT_EQ(sparkv_config_layer(&solved.config, 7, 30, &rows, nullptr), SPARKV_OK);
  EXPECT_EQ(rows.kept, SPARKV_INT4);
  ASSERT_EQ(sparkv_config_layer(&solved.config, 29, 30, &rows, nullptr), SPARKV_OK);
  EXPECT_EQ(rows.kept, SPARKV_INT8);
  EXPECT_LE(8 * Bytes(solved.config, shapes, 30) / kElements, 5.0);
}

TEST(Budget, CachesOfOneModelShareIt) {
  const std::vector<sparkv_layer_shape> wide(15, {1, 256, 256}), few(3, {1, 256, 256});
  std::vector<int32_t> sliding, full;
  for (int32_t i = 0; i < 18; ++i) (i % 6 == 5 ? full : sliding).push_back(i);
  const std::vector<sparkv_shape> shapes = {Shape(wide, 768, 1, sliding.data()),
                                            Shape(few, 32768, 1, full.data())};
  const Solved solved = Solve(Config({{"budget", "4.5bpe"}}), shapes);
  ASSERT_EQ(solved.status, SPARKV_OK) << solved.error;
  const double elements = (15.0 * 768 + 3.0 * 32768) * 512;
  EXPECT_LE(8 * Bytes(solved.config, shapes, 18) / elements, 4.5);
  EXPECT_GT(8 * Bytes(solved.config, shapes, 18) / elements, 4.2);
}

TEST(Budget, WhatCannotBeMetIsRefusedWithTheLeast) {
  const std::vector<sparkv_shape> shapes = {Shape(kSmol)};
  Solved solved = Solve(Config({{"budget", "1.5bpe"}}), shapes);
  EXPECT_EQ(solved.status, SPARKV_INVALID);
  EXPECT_NE(solved.error.find("budget: \"1.5bpe\" is below the least"), std::string::npos)
      << solved.error;
  EXPECT_NE(solved.error.find("bits per element"), std::string::npos) << solved.error;
  solved = Solve(Config({{"budget", "1MiB"}}), shapes);
  EXPECT_EQ(solved.status, SPARKV_INVALID);
  EXPECT_NE(solved.error.find(" bytes"), std::string::npos) << solved.error;
  // A context that the window fills is dense.
  solved = Solve(Config({{"budget", "8bpe"}}), {Shape(kSmol, 64)});
  EXPECT_EQ(solved.status, SPARKV_INVALID);
}

TEST(Budget, TextsThatAreNoBudgets) {
  sparkv_config config = Config({});
  const sparkv_config before = config;
  sparkv_error error = {};
  for (const char* text : {"4", "bpe", "-4bpe", "4 bpe", "0bpe", "nanbpe", "infMiB", "1e3MiB",
                           "4bpe ", "4bits", "autobahn", "9999999999999999GiB", "1.2.3bpe"}) {
    EXPECT_EQ(sparkv_config_set(&config, "budget", text, &error), SPARKV_INVALID) << text;
    EXPECT_NE(std::string(error.text).find("budget: "), std::string::npos) << error.text;
  }
  for (const char* text :
       {"3", "3:", ":1", "3:-1", "3:nan", "5-3:1", "3:1,", "3:1e10", "x:1", "10000:1"}) {
    EXPECT_EQ(sparkv_config_set(&config, "sensitivity", text, &error), SPARKV_INVALID) << text;
    EXPECT_NE(std::string(error.text).find("sensitivity: "), std::string::npos) << error.text;
  }
  EXPECT_EQ(std::memcmp(&config, &before, sizeof(config)), 0);
  // Plain numbers from C are checked too.
  std::memset(config.budget, '4', sizeof(config.budget));
  const Solved solved = Solve(config, {Shape(kSmol)});
  EXPECT_EQ(solved.status, SPARKV_INVALID);
  EXPECT_EQ(solved.error, "budget: the text has no end");
}

TEST(Budget, ACacheIsMadeUnderIt) {
  const sparkv_config config = Config({{"budget", "5bpe"}});
  const sparkv_shape shape = Shape(kSmol);
  sparkv_cache* cache = nullptr;
  sparkv_error error = {};
  ASSERT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_OK) << error.text;
  sparkv_cache_free(cache);
  const sparkv_config small = Config({{"budget", "1.5bpe"}});
  EXPECT_EQ(sparkv_cache_create(&small, &shape, &cache, &error), SPARKV_INVALID);
}

}  // namespace

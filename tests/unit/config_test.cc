#include "config/config.h"
#include "cache/dense_store.h"
#include "config/layers.h"
#include "config/recent.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

namespace sparkv {
namespace {

sparkv_config Preset(const char* name) {
  sparkv_config config = {};
  config.struct_size = sizeof(config);
  sparkv_error error = {};
  EXPECT_EQ(sparkv_config_preset(&config, name, &error), SPARKV_OK) << error.text;
  return config;
}

std::string PresetError(const char* name) {
  sparkv_config config = Preset("spark-0.8");
  const sparkv_config before = config;
  sparkv_error error = {};
  EXPECT_EQ(sparkv_config_preset(&config, name, &error), SPARKV_INVALID) << name;
  EXPECT_EQ(std::memcmp(&before, &config, sizeof(config)), 0)
      << name << " changed the configuration";
  return error.text;
}

std::string SetError(const char* key, const char* value) {
  sparkv_config config = Preset("spark-0.8");
  const sparkv_config before = config;
  sparkv_error error = {};
  EXPECT_EQ(sparkv_config_set(&config, key, value, &error), SPARKV_INVALID) << key << "=" << value;
  EXPECT_EQ(std::memcmp(&before, &config, sizeof(config)), 0)
      << key << " changed the configuration";
  return error.text;
}

std::string Text(const sparkv_config& config) {
  char text[256] = {};
  const size_t length = sparkv_config_text(&config, text, sizeof(text));
  EXPECT_EQ(length, std::strlen(text));
  return text;
}

TEST(Config, NoNameMeansTheDefaultPreset) {
  EXPECT_STREQ(Preset(nullptr).preset, "balanced");
  EXPECT_STREQ(Preset("").preset, "balanced");
  EXPECT_EQ(
      Text(Preset(nullptr)),
      "balanced ratio 0 recover mean kept t5321 values t2 sinks 4 window 32 seal stream layers "
      "middle=tiers-6321 recent 831:t7543+t4");
  EXPECT_EQ(Text(Preset("spark-0.5-i5")),
            "spark-0.5-i5 ratio 0.5 recover mean kept i5 values q4 sinks 4 window 96 seal stream");
}

TEST(Config, ExactPrunesNothingAndRoundsNothing) {
  const sparkv_config config = Preset("exact");
  EXPECT_EQ(config.ratio, 0.0);
  EXPECT_EQ(config.kept, SPARKV_F16);
  EXPECT_EQ(config.values, SPARKV_F16);
  for (int head_dim : {32, 64, 80, 512}) EXPECT_EQ(KeptChannels(config.ratio, head_dim), head_dim);
}

TEST(Config, PaperPresetsAreThePaper) {
  const sparkv_config config = Preset("spark-0.8");
  EXPECT_EQ(config.ratio, 0.8);
  EXPECT_EQ(config.recover, SPARKV_RECOVER_MEAN);
  EXPECT_EQ(config.group, SPARKV_GROUP_SIGNED);
  EXPECT_EQ(config.kept, SPARKV_F16);
  EXPECT_EQ(config.values, SPARKV_F16);
  EXPECT_EQ(config.sinks, 4);
  EXPECT_EQ(config.window, 32);
  EXPECT_EQ(config.observe, 32);
  EXPECT_EQ(config.seal, SPARKV_SEAL_STREAM);
}

TEST(Config, IntegerPresetsChooseTheirValues) {
  EXPECT_EQ(Preset("spark-0.5-i8").values, SPARKV_INT8);
  EXPECT_EQ(Preset("spark-0.5-i6").values, SPARKV_INT4);
  EXPECT_EQ(Preset("spark-0.5-i5").values, SPARKV_INT4);
  EXPECT_EQ(Preset("spark-0.5-i4").values, SPARKV_INT4);
  EXPECT_EQ(Preset("spark-0.5-i6").kept, SPARKV_INT6);
  EXPECT_EQ(Preset("tiers-7432").kept, SPARKV_TIERS_7432);
  EXPECT_EQ(Preset("tiers-7432").values, SPARKV_TRELLIS4);
  EXPECT_EQ(Preset("tiers-6321").values, SPARKV_TRELLIS3);
  EXPECT_EQ(Preset("tiers-5321").values, SPARKV_TRELLIS2);
  EXPECT_EQ(Preset("tiers-7432").ratio, 0.0);
  EXPECT_EQ(Text(Preset("tiers-6321")),
            "tiers-6321 ratio 0 recover mean kept t6321 values t3 sinks 4 window 96 seal stream");
}

TEST(Config, PresetNamesAreNormalised) {
  EXPECT_STREQ(Preset("spark-.8").preset, "spark-0.8");
  EXPECT_STREQ(Preset("spark-0.50-i5").preset, "spark-0.5-i5");
  EXPECT_STREQ(Preset("spark-1").preset, "spark-1");
  EXPECT_STREQ(Preset("spark-0").preset, "spark-0");
  EXPECT_STREQ(Preset("spark-0.333").preset, "spark-0.333");
  EXPECT_EQ(Preset(Preset("spark-.333").preset).ratio, 0.333);
}

TEST(Config, UnknownPresetsAreNamed) {
  EXPECT_EQ(PresetError("foo"),
            "preset: \"foo\" is unknown (safe, balanced, small, tiny, exact, spark-0.5, spark-0.8, "
            "spark-0.5-i5, ..., tiers-7543, ...)");
  EXPECT_NE(PresetError("spark-0.5-i7").find("one of i8, i6, i5, i4"), std::string::npos);
  EXPECT_EQ(PresetError("spark-2"), "preset: \"spark-2\" has a ratio outside [0, 1]");
  for (const char* name :
       {"spark",           "spark-",     "spark-x",   "spark-0.5x", "spark-0.5-",
        "spark-0.5-i",     "spark--0.5", "tiers-",    "tiers-9999", "tiers-7432x",
        "spark-0.5-t7432", "spark-nan",  "spark-inf", "spark-1e-1", "spark-0.5-i5x",
        "spark-0.5-i5-i5", "Exact",      "exact ",    " exact",     "spark-0,5",
        "spark-1e999"}) {
    EXPECT_EQ(PresetError(name).substr(0, 8), "preset: ") << name;
  }
  EXPECT_NE(PresetError("spark-0.0000000000000000000000000001").find("too many digits"),
            std::string::npos);
}

TEST(Config, ErrorsAreOneShortLineWhateverTheValue) {
  const std::string text = PresetError((std::string(5000, 'a') + "\n\x1b[31m").c_str());
  EXPECT_LT(text.size(), 200u);
  const std::string control = SetError("kept", "i5\nsecond line\x1b");
  EXPECT_EQ(control.find_first_of("\n\x1b"), std::string::npos);
}

TEST(Config, ParametersAreSetByName) {
  sparkv_config config = Preset("spark-0.5-i5");
  const auto set = [&](const char* key, const char* value) {
    sparkv_error error = {};
    EXPECT_EQ(sparkv_config_set(&config, key, value, &error), SPARKV_OK) << error.text;
  };
  set("ratio", "0.8");
  set("recover", "paper");
  set("group", "energy");
  set("kept", "int8");
  set("values", "f16");
  set("sinks", "0");
  set("window", "65536");
  set("observe", "1");
  set("seal", "prefill-end");
  set("simd", "avx512");
  set("threads", "256");
  EXPECT_EQ(Text(config),
            "spark-0.5-i5 ratio 0.8 recover paper group energy kept i8 values f16 sinks 0 window "
            "65536 observe 1 "
            "seal prefill-end simd avx512 threads 256");
  set("ratio", "-0");
  EXPECT_FALSE(std::signbit(config.ratio));
  set("ratio", "1e-1");
  EXPECT_EQ(config.ratio, 0.1);
}

TEST(Config, BadRatiosAreRefused) {
  EXPECT_EQ(SetError("ratio", "2"), "ratio: 2 is outside [0, 1]");
  EXPECT_EQ(SetError("ratio", "-0.1"), "ratio: -0.1 is outside [0, 1]");
  EXPECT_EQ(SetError("ratio", "nan"), "ratio: nan is outside [0, 1]");
  EXPECT_EQ(SetError("ratio", "inf"), "ratio: inf is outside [0, 1]");
  EXPECT_EQ(SetError("ratio", "1e999"), "ratio: 1e999 is outside [0, 1]");
  EXPECT_EQ(SetError("ratio", "0.5x"), "ratio: \"0.5x\" is not a number");
  for (const char* value : {"", " 0.5", "0.5 ", "+0.5", "0,5", "0x1", ".", "-"}) {
    EXPECT_NE(SetError("ratio", value).find("is not a number"), std::string::npos) << value;
  }
}

TEST(Config, BadCountsAreRefused) {
  EXPECT_EQ(SetError("sinks", "1025"), "sinks: 1025 is outside [0, 1024]");
  EXPECT_EQ(SetError("sinks", "-1"), "sinks: -1 is outside [0, 1024]");
  EXPECT_EQ(SetError("observe", "0"), "observe: 0 is outside [1, 1024]");
  EXPECT_EQ(SetError("window", "99999999999999999999"),
            "window: 99999999999999999999 is outside [0, 65536]");
  EXPECT_EQ(SetError("threads", "4.0"), "threads: \"4.0\" is not a whole number");
  EXPECT_EQ(SetError("threads", ""), "threads: \"\" is not a whole number");
}

TEST(Config, UnknownNamesListTheKnownOnes) {
  EXPECT_EQ(SetError("recover", "median"), "recover: \"median\" is unknown (zero, mean, paper)");
  EXPECT_EQ(SetError("kept", "i7"),
            "kept: \"i7\" is unknown (f16, i8, i6, i5, i4, t7543, t7432, t6321, t5321, t4210)");
  EXPECT_EQ(SetError("values", "i5"), "values: \"i5\" is unknown (f16, q8, q4, t4, t3, t2, t1)");
  EXPECT_EQ(SetError("seal", ""), "seal: \"\" is unknown (stream, prefill-end)");
  EXPECT_EQ(SetError("raito", "1"),
            "parameter: \"raito\" is unknown (ratio, layers, protect, budget, sensitivity, "
            "recent, evict, baseline, recover, group, kept, values, seal, simd, sinks, window, "
            "observe, threads)");
}

TEST(Config, RecentRowsAreStagesFromYoungToOld) {
  sparkv_config config = Preset("tiers-5321");
  ASSERT_EQ(SetParameter("recent", "256:i8+q8,1024:t7432+t4", &config).text, "");
  EXPECT_TRUE(ConfigText(config).ends_with(" recent 256:i8+q8,1024:t7432+t4"))
      << ConfigText(config);
  EXPECT_EQ(CheckConfig(config).text, "");
  std::vector<RecentStage> stages = RecentStages(config);
  ASSERT_EQ(stages.size(), 2u);
  EXPECT_EQ(stages[1].until, 1024);
  EXPECT_EQ(stages[1].kept, SPARKV_TIERS_7432);
  EXPECT_EQ(stages[1].values, SPARKV_TRELLIS4);
  config.window = 256;  // has the rows of the first
  EXPECT_EQ(RecentStages(config).size(), 1u);
  EXPECT_EQ(CheckConfig(config).text, "");
  config.evict = SPARKV_EVICT_SNAPKV;
  config.evict_tokens = 1000;  // are fewer than the last would have
  EXPECT_TRUE(RecentStages(config).empty());
  EXPECT_EQ(CheckConfig(config).text, "");
  config.evict_tokens = 1 << 25;
  EXPECT_EQ(CheckConfig(config).text, "evict: 33554432 is outside [1, 2^24]");
  EXPECT_EQ(SetError("recent", "256"),
            "recent: \"256\" is not TOKENS:KEYS+VALUES, as in 256:i8+q8");
  EXPECT_EQ(SetError("recent", "256:i8"),
            "recent: \"256:i8\" is not TOKENS:KEYS+VALUES, as in 256:i8+q8");
  EXPECT_EQ(SetError("recent", "x:i8+q8"), "recent: \"x:i8+q8\" begins with no number of tokens");
  EXPECT_EQ(SetError("recent", "0:i8+q8"), "recent: \"0:i8+q8\" has tokens outside [1, 65536]");
  EXPECT_EQ(SetError("recent", "9:f16+q8"),
            "recent: \"9:f16+q8\" has f16 numbers: that is the window");
  EXPECT_TRUE(
      SetError("recent", "9:i7+q8")
          .starts_with("recent: \"9:i7+q8\" has keys of no known number (kept: \"i7\" is unknown"));
  EXPECT_EQ(SetError("recent", "9:i8+q8,9:i6+q4"), "recent: 9 tokens behind 9");
  EXPECT_EQ(SetError("recent", "1:i8+q8,2:i8+q8,3:i8+q8,4:i8+q8"), "recent: more than 3 stages");
  EXPECT_EQ(SetError("recent", "9:i8+q8,"),
            "recent: \"\" is not TOKENS:KEYS+VALUES, as in 256:i8+q8");
  ASSERT_EQ(SetParameter("recent", "none", &config).text, "");
  EXPECT_STREQ(config.recent, "");
  EXPECT_EQ(std::string(Preset("balanced").recent), "831:t7543+t4");
  EXPECT_STREQ(Preset("balanced").preset, "balanced");
  EXPECT_EQ(Preset("balanced").window, 32);
  EXPECT_EQ(CheckConfig(Preset("tiny")).text, "");
  EXPECT_EQ(CheckConfig(Preset("small")).text, "");
  EXPECT_EQ(CheckConfig(Preset("safe")).text, "");
  std::memset(config.recent, 'x', sizeof(config.recent));
  EXPECT_NE(CheckConfig(config).text, "");
}

// Ages of a preset are for 4,096 tokens. Each store has whole groups of slots, the row on its way
// to the next one counted.
TEST(Config, UnderEvictionAgesOfAPresetAreInProportion) {
  const auto with = [](const char* preset, const char* evict) {
    sparkv_config config = Preset(preset);
    EXPECT_EQ(SetParameter("evict", evict, &config).text, "");
    EXPECT_EQ(CheckConfig(config).text, "");
    EXPECT_EQ(RecentStages(config).size(), size_t(std::ranges::count(config.recent, ':')));
    return std::to_string(config.window) + " " + config.recent;
  };
  EXPECT_EQ(with("balanced", "snapkv:512"), "7 238:t7543+t4");
  EXPECT_EQ(with("balanced", "tova:2048"), "32 831:t7543+t4");
  EXPECT_EQ(with("balanced", "tova:3000"), "32 831:t7543+t4");
  EXPECT_EQ(with("balanced", "snapkv:4096"), "32 831:t7543+t4");
  EXPECT_EQ(with("safe", "snapkv:512"), "15 118:i8+q8");
  EXPECT_EQ(with("small", "snapkv:512"), "7 74:t7543+t4,397:t5321+t2");
  EXPECT_EQ(with("tiny", "snapkv:64"), "3 18:t5321+t2");
  EXPECT_EQ(with("exact", "snapkv:512"), "32 ");
  EXPECT_EQ(with("tiers-6321", "snapkv:512"), "96 ");
  sparkv_config config = Preset("balanced");
  ASSERT_EQ(SetParameter("evict", "snapkv:512", &config).text, "");
  for (const int64_t rows : {config.sinks + config.window, 238 - config.window})
    EXPECT_EQ((rows + 1) % kGroupSlots, 0) << rows;
  EXPECT_STREQ(config.layers, "");  // the middle's bytes are in the stage
  ASSERT_EQ(SetParameter("evict", "none", &config).text, "");
  EXPECT_EQ(Text(config), Text(Preset("balanced")));
}

TEST(Config, WhatTheUserSaysOfAgesStaysUnderEviction) {
  sparkv_config config = Preset("balanced");
  ASSERT_EQ(SetParameter("recent", "200:i8+q8", &config).text, "");
  ASSERT_EQ(SetParameter("evict", "snapkv:512", &config).text, "");
  EXPECT_EQ(config.window, 7);
  EXPECT_STREQ(config.recent, "200:i8+q8");
  ASSERT_EQ(SetParameter("window", "32", &config).text, "");
  ASSERT_EQ(SetParameter("recent", "128:i8+q8,1023:t7432+t4", &config).text, "");
  ASSERT_EQ(SetParameter("evict", "snapkv:256", &config).text, "");
  EXPECT_EQ(config.window, 32);
  EXPECT_STREQ(config.recent, "128:i8+q8,1023:t7432+t4");
  ASSERT_EQ(SetParameter("recent", "none", &config).text, "");
  ASSERT_EQ(SetParameter("evict", "none", &config).text, "");
  EXPECT_STREQ(config.recent, "");
}

TEST(Config, EvictionNamesAMethodAndTokens) {
  sparkv_config config = Preset("spark-0.5-i5");
  ASSERT_EQ(SetParameter("evict", "snapkv:512", &config).text, "");
  EXPECT_EQ(config.evict, SPARKV_EVICT_SNAPKV);
  EXPECT_EQ(config.evict_tokens, 512);
  EXPECT_TRUE(ConfigText(config).ends_with(" evict snapkv:512")) << ConfigText(config);
  EXPECT_EQ(CheckConfig(config).text, "");
  config.evict_tokens = 100;
  EXPECT_EQ(CheckConfig(config).text, "evict: 100 tokens are not above sinks 4 and window 96");
  ASSERT_EQ(SetParameter("evict", "none", &config).text, "");
  EXPECT_EQ(config.evict_tokens, 0);
  config.evict = 8;
  EXPECT_EQ(CheckConfig(config).text,
            "evict: 8 is unknown (none, streamingllm, tova, knorm, keydiff, snapkv, pyramidkv, "
            "expected)");
  EXPECT_EQ(SetError("evict", "snapkv"), "evict: \"snapkv\" names no tokens, as in snapkv:512");
  EXPECT_EQ(SetError("evict", "snapkv:"), "evict: \"snapkv:\" names no tokens, as in snapkv:512");
  EXPECT_EQ(SetError("evict", "snapkv:0"), "evict: 0 is outside [1, 2^24]");
  EXPECT_EQ(SetError("evict", "snapkv:512x"),
            "evict: \"snapkv:512x\" names no tokens, as in snapkv:512");
  EXPECT_EQ(SetError("evict", "none:3"), "evict: none takes no tokens");
  EXPECT_EQ(SetError("evict", "h2o:512"),
            "evict: \"h2o:512\" is unknown (none, streamingllm, tova, knorm, keydiff, snapkv, "
            "pyramidkv, expected, each but none with tokens: snapkv:512)");
}

TEST(Config, LayersTakeTheRowsOfTheirPreset) {
  sparkv_config config = Preset("spark-0.5-i5"), one{};
  sparkv_error error = {};
  ASSERT_EQ(SetParameter("layers", "0-1=spark-0-i8,7=spark-0.25-i6+q4,1=exact", &config).text, "");
  const auto rows = [&](int layer) {
    EXPECT_EQ(sparkv_config_layer(&config, layer, 30, &one, &error), SPARKV_OK) << error.text;
    EXPECT_STREQ(one.layers, "");
    EXPECT_STREQ(one.preset, "spark-0.5-i5");
    EXPECT_EQ(one.window, config.window);
    return std::tuple(one.ratio, one.kept, one.values);
  };
  EXPECT_EQ(rows(0), std::tuple(0.0, SPARKV_INT8, SPARKV_INT8));
  EXPECT_EQ(rows(1), std::tuple(0.0, SPARKV_F16, SPARKV_F16)) << "the last entry wins";
  EXPECT_EQ(rows(2), std::tuple(0.5, SPARKV_INT5, SPARKV_INT4));
  EXPECT_EQ(rows(7), std::tuple(0.25, SPARKV_INT6, SPARKV_INT4));
  EXPECT_NE(ConfigText(config).find(" layers 0-1=spark-0-i8,7"), std::string::npos);
  EXPECT_EQ(sparkv_config_layer(&config, -1, 30, &one, &error), SPARKV_INVALID);
  EXPECT_STREQ(error.text, "layer: -1 is outside [0, 9999]");
  EXPECT_EQ(sparkv_config_layer(&config, 0, 30, nullptr, &error), SPARKV_INVALID);
}

TEST(Config, PresetsHaveMoreInTheMiddle) {
  const auto more = [](const sparkv_config& config, int n_layers) {
    std::string layers;
    for (int layer = 0; layer < n_layers; ++layer) {
      sparkv_config one = config;
      EXPECT_EQ(SetLayer(layer, n_layers, &one).text, "");
      if (one.kept != config.kept) layers += std::to_string(layer) + " ";
    }
    return layers;
  };
  const sparkv_config balanced = Preset("balanced");
  EXPECT_EQ(more(balanced, 30), "17 18 19 20 ");
  EXPECT_EQ(more(balanced, 18), "10 11 12 ");
  EXPECT_EQ(more(balanced, 32), "18 19 20 21 22 ");
  EXPECT_EQ(more(balanced, 3), "2 ");
  EXPECT_EQ(more(balanced, 1), "");
  EXPECT_EQ(more(Preset("small"), 30), "17 18 19 20 ");
  EXPECT_EQ(more(Preset("safe"), 30), "");
  sparkv_config one = balanced;
  ASSERT_EQ(SetLayer(18, 30, &one).text, "");
  EXPECT_EQ(std::tuple(one.kept, one.values), std::tuple(SPARKV_TIERS_6321, SPARKV_TRELLIS3));
  // What is said of all rows holds there, too, and layers of one's own replace the preset's.
  for (const auto& [key, value] : {std::pair("kept", "i8"), std::pair("values", "q8"),
                                   std::pair("ratio", "0"), std::pair("layers", "none")}) {
    sparkv_config config = balanced;
    ASSERT_EQ(SetParameter(key, value, &config).text, "");
    EXPECT_STREQ(config.layers, "") << key;
  }
  sparkv_config own = balanced;
  ASSERT_EQ(SetParameter("layers", "middle=tiers-7543,18=tiers-4210", &own).text, "");
  ASSERT_EQ(SetParameter("values", "q8", &own).text, "");
  EXPECT_EQ(more(own, 30), "17 18 19 20 ");
  one = own;
  ASSERT_EQ(SetLayer(18, 30, &one).text, "");
  EXPECT_EQ(one.kept, SPARKV_TIERS_4210);
  EXPECT_EQ(CheckConfig(own).text, "");
}

TEST(Config, ProtectedLayersKeepEightBitsWhateverTheRestSays) {
  sparkv_config config = Preset("spark-0.8"), one{};
  ASSERT_EQ(SetParameter("layers", "0-3=exact", &config).text, "");
  ASSERT_EQ(SetParameter("protect", "first:2,last:1", &config).text, "");
  EXPECT_NE(ConfigText(config).find(" protect first:2,last:1"), std::string::npos);
  const auto kept = [&](int layer, int n_layers) {
    sparkv_error error = {};
    EXPECT_EQ(sparkv_config_layer(&config, layer, n_layers, &one, &error), SPARKV_OK) << error.text;
    EXPECT_EQ(one.protect_first + one.protect_last, 0);
    return std::tuple(one.ratio, one.kept, one.values);
  };
  const std::tuple eight(0.0, SPARKV_INT8, SPARKV_INT8), exact(0.0, SPARKV_F16, SPARKV_F16);
  EXPECT_EQ(kept(0, 30), eight);
  EXPECT_EQ(kept(1, 30), eight);
  EXPECT_EQ(kept(2, 30), exact);
  EXPECT_EQ(kept(28, 30), std::tuple(0.8, SPARKV_F16, SPARKV_F16));
  EXPECT_EQ(kept(29, 30), eight);
  ASSERT_EQ(SetParameter("protect", "last:2", &config).text, "");
  EXPECT_EQ(kept(0, 30), exact);
  EXPECT_EQ(kept(28, 30), eight);
  for (const char* bad : {"first", "first:", "2", "first:2,", "middle:1", "first:1 ,last:1"}) {
    EXPECT_EQ(SetError("protect", bad),
              "protect: " + Quote(bad) + " is not first:N, last:N or both");
  }
  EXPECT_EQ(SetError("protect", "last:-1"), "protect: \"last:-1\" is outside 0..9999");
  EXPECT_EQ(SetError("protect", "last:99999999999"),
            "protect: \"last:99999999999\" is outside 0..9999");
  config.protect_last = -1;
  EXPECT_EQ(CheckConfig(config).text, "protect last: -1 is outside [0, 9999]");
}

TEST(Config, BadLayersAreNamedAndChangeNothing) {
  const std::pair<const char*, const char*> cases[] = {
      {"0", "layers: \"0\" is not LAYER=PRESET, FIRST-LAST=PRESET or middle=PRESET"},
      {"0=exact,", "layers: \"\" is not LAYER=PRESET, FIRST-LAST=PRESET or middle=PRESET"},
      {"2-1=exact", "layers: \"2-1=exact\" names no layers in 0..9999"},
      {"-1=exact", "layers: \"-1=exact\" names no layers in 0..9999"},
      {"1-=exact", "layers: \"1-=exact\" names no layers in 0..9999"},
      {"0-99999999999=exact", "layers: \"0-99999999999=exact\" names no layers in 0..9999"},
      {"0=", "layers: \"0=\" names no preset"},
      {"0=exact+", "layers: \"0=exact+\" has no values behind the +"},
      {"0=exact+q5", "values: \"q5\" is unknown (f16, q8, q4, t4, t3, t2, t1)"},
  };
  for (const auto& [text, why] : cases) EXPECT_EQ(SetError("layers", text), why) << text;
  EXPECT_NE(SetError("layers", "0=spork").find("preset: \"spork\" is unknown"), std::string::npos);
  std::string many = "0=exact";
  while (many.size() < 2048) many += ",0=exact";
  EXPECT_EQ(SetError("layers", many.c_str()),
            "layers: " + std::to_string(many.size()) + " characters, at most 2047 fit");
  sparkv_config config = Preset("exact");
  std::memset(config.layers, '1', sizeof(config.layers));
  EXPECT_EQ(CheckConfig(config).text, "layers: the text has no end");
}

TEST(Config, NullAndForeignStructsAreRefused) {
  sparkv_error error = {};
  EXPECT_EQ(sparkv_config_preset(nullptr, "exact", &error), SPARKV_INVALID);
  EXPECT_STREQ(error.text, "config: NULL");
  sparkv_config config = {};
  EXPECT_EQ(sparkv_config_preset(&config, "exact", &error), SPARKV_INVALID);
  EXPECT_NE(std::string(error.text).find("config.struct_size: 0"), std::string::npos);
  config = Preset("exact");
  EXPECT_EQ(sparkv_config_set(&config, nullptr, "1", &error), SPARKV_INVALID);
  EXPECT_EQ(sparkv_config_set(&config, "ratio", nullptr, nullptr), SPARKV_INVALID);
}

TEST(Config, TextIsCutToTheBufferAndTerminated) {
  const sparkv_config config = Preset("exact");
  const size_t needed = sparkv_config_text(&config, nullptr, 0);
  char text[8] = "xxxxxxx";
  EXPECT_EQ(sparkv_config_text(&config, text, sizeof(text)), needed);
  EXPECT_STREQ(text, "exact r");
}

TEST(Config, CheckFindsTheFirstFieldOutOfRange) {
  const sparkv_config good = Preset("spark-0.5-i5");
  EXPECT_TRUE(CheckConfig(good).ok());
  sparkv_config config = good;
  config.ratio = std::nan("");
  EXPECT_EQ(CheckConfig(config).text, "ratio: nan is outside [0, 1]");
  config = good;
  config.kept = 10;
  EXPECT_EQ(CheckConfig(config).text,
            "kept: 10 is unknown (f16, i8, i6, i5, i4, t7543, t7432, t6321, t5321, t4210)");
  config = good;
  config.values = SPARKV_INT5;
  EXPECT_EQ(CheckConfig(config).text, "values: 3 is unknown (f16, q8, q4, t4, t3, t2, t1)");
  config = good;
  config.observe = 0;
  EXPECT_EQ(CheckConfig(config).text, "observe: 0 is outside [1, 1024]");
}

TEST(Config, KeptChannelsTruncateTheDoubleProduct) {
  const struct {
    int head_dim;
    double ratio;
    int kept;
  } cases[] = {{64, 0.3, 45},  {64, 0.5, 32},   {64, 0.8, 13},  {128, 0.3, 90}, {128, 0.5, 64},
               {128, 0.8, 26}, {256, 0.3, 180}, {256, 0.8, 52}, {64, 1.0, 0},   {64, 0.01, 64}};
  for (const auto& c : cases)
    EXPECT_EQ(KeptChannels(c.ratio, c.head_dim), c.kept) << c.head_dim << " " << c.ratio;
}

}  // namespace
}  // namespace sparkv

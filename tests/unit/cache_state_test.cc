// Rows that come from outside or move: state files, copies of streams, context shift; and the
// border to the host.
#include <gtest/gtest.h>

#include <cstring>

#include "cache_model.h"
#include "config/recent.h"

namespace sparkv::test {
namespace {

// What a host saves of cells first .. first+n-1.
struct Saved {
  std::vector<std::vector<uint16_t>> keys, values;  // per layer
};

Saved Save(Host& host, int64_t first, int64_t n) {
  Saved saved;
  for (int l = 0; l < host.n_layers(); ++l) {
    saved.keys.push_back(host.Read(kKeys, l, first, n));
    saved.values.push_back(host.Read(kValues, l, first, n));
  }
  return saved;
}

Saved Raw(const Host& host, int text, int n) {
  Saved saved;
  for (int l = 0; l < host.n_layers(); ++l) {
    saved.keys.emplace_back();
    saved.values.emplace_back();
    for (int t = 0; t < n; ++t) {
      for (const uint16_t x : Halves(Numbers(Content(text, t), kKeys, l, host.layer(l).k_row())))
        saved.keys.back().push_back(x);
      for (const uint16_t x : Halves(Numbers(Content(text, t), kValues, l, host.layer(l).v_row())))
        saved.values.back().push_back(x);
    }
  }
  return saved;
}

// As llama.cpp does: keys of all layers, then values of all layers.
void Load(Host& host, const Saved& saved, int64_t first) {
  for (int l = 0; l < host.n_layers(); ++l) host.Restore(kKeys, l, first, saved.keys[size_t(l)]);
  for (int l = 0; l < host.n_layers(); ++l)
    host.Restore(kValues, l, first, saved.values[size_t(l)]);
}

// Sequence `s` of the host holds tokens 0 .. n-1 of a text in cells first, first+1, ...
void Hold(Host& host, int s, int text, int n, int64_t first) {
  for (int t = 0; t < n; ++t) host.Adopt(s, {first + t, Content(text, t)});
}

// Presets, and layers of their own or stages ("recent ...").
class State : public testing::TestWithParam<std::pair<const char*, const char*>> {
 protected:
  Model Small() const {
    Model model;
    model.preset = GetParam().first;
    model.set = {{"window", "16"}, {"observe", "24"}};
    constexpr size_t kRecent = sizeof("recent ") - 1;
    const bool recent = std::strncmp(GetParam().second, "recent ", kRecent) == 0;
    model.set.emplace_back(recent ? "recent" : "layers",
                           GetParam().second + (recent ? kRecent : 0));
    model.cells = 512;
    return model;
  }
};
INSTANTIATE_TEST_SUITE_P(Presets, State,
                         testing::Values(std::pair{"exact", ""}, std::pair{"spark-0.5", ""},
                                         std::pair{"spark-0.8", ""}, std::pair{"spark-0.5-i8", ""},
                                         std::pair{"spark-0.5-i5", ""}, std::pair{"tiers-7432", ""},
                                         std::pair{"tiers-5321", ""},
                                         std::pair{"tiers-6321", "1=spark-0.5-i5"},
                                         std::pair{"spark-0.5-i5", "0=spark-0-i8"},
                                         std::pair{"spark-0.5-i5", "0=exact"},
                                         std::pair{"spark-0.5-i5", "recent 29:i8+q8"},
                                         std::pair{"tiers-5321", "recent 22:i8+q8,33:t7432+t4"},
                                         std::pair{"exact", "1=spark-0.8-i4+q8"}));

// ---- restore ----

TEST_P(State, RestoredInTheSameCellsItContinuesAsIfNothingHadHappened) {
  Host usual(Small()), host(Small());
  usual.Feed(0, 1, 0, 100, {100});
  host.Feed(0, 1, 0, 100, {33});
  sparkv_cache_set_threads(host.cache, 3);
  const int64_t sealed = host.Memory().sealed;
  const Saved saved = Save(host, 0, 100);
  sparkv_cache_release(host.cache, 0, 512);
  EXPECT_EQ(host.Memory().tokens, 0);
  Load(host, saved, 0);
  for (int64_t cell = 0; cell < 100; ++cell) ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
  EXPECT_TRUE(Near(host.Feed(0, 1, 100, 40, {7}), usual.Feed(0, 1, 100, 40, {40}), kSums));
  EXPECT_EQ(host.Memory().sealed, usual.Memory().sealed);
  EXPECT_EQ(sealed + 40, usual.Memory().sealed);
  for (int64_t cell = 0; cell < 140; ++cell) ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
  EXPECT_EQ(sparkv_cache_unknown_rows(host.cache), 0);
}

TEST_P(State, RestoredInOtherCellsWhileTheFirstAreLiveItContinues) {
  Host usual(Small()), host(Small());
  usual.Feed(0, 1, 0, 100, {100});
  host.Feed(0, 1, 0, 100, {33});
  Load(host, Save(host, 0, 100), 203);
  Hold(host, 1, 1, 100, 203);
  EXPECT_TRUE(Near(host.Feed(1, 1, 100, 40, {7}), usual.Feed(0, 1, 100, 40, {40}), kSums));
  EXPECT_EQ(host.Memory().sealed, 2 * usual.Memory().sealed - 40);
  EXPECT_EQ(sparkv_cache_unknown_rows(host.cache), 0);
}

TEST_P(State, RestoredInAFreshCacheWithTheWeightsItContinues) {
  Host usual(Small()), host(Small());
  usual.Feed(0, 1, 0, 100, {100});
  const std::vector<uint8_t> weights = usual.Weights();
  ASSERT_EQ(sparkv_cache_load_weights(host.cache, weights.data(), weights.size(), &host.error),
            SPARKV_OK)
      << host.error.text;
  Load(host, Save(usual, 0, 100), 0);
  Hold(host, 0, 1, 100, 0);
  EXPECT_TRUE(Near(host.Feed(0, 1, 100, 40, {7}), usual.Feed(0, 1, 100, 40, {40}), kSums));
  EXPECT_EQ(host.Memory().sealed, usual.Memory().sealed);
  for (int64_t cell = 0; cell < 140; ++cell) ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
  EXPECT_EQ(sparkv_cache_unknown_rows(host.cache), 0);
}

TEST_P(State, LayersMayBeRestoredInAnyOrderAndRangesOneAfterTheOther) {
  Host usual(Small()), host(Small());
  usual.Feed(0, 1, 0, 100, {100});
  host.Feed(0, 1, 0, 100, {100});
  const Saved low = Save(host, 0, 37), high = Save(host, 37, 63);
  sparkv_cache_release(host.cache, 0, 512);
  for (const auto& [saved, first] : {std::pair<const Saved&, int64_t>{low, 0}, {high, 37}}) {
    host.Restore(kKeys, 1, first, saved.keys[1]);
    host.Restore(kValues, 1, first, saved.values[1]);
    host.Restore(kKeys, 0, first, saved.keys[0]);
    host.Restore(kValues, 0, first, saved.values[0]);
  }
  EXPECT_TRUE(Near(host.Feed(0, 1, 100, 40, {7}), usual.Feed(0, 1, 100, 40, {40}), kSums));
  for (int64_t cell = 0; cell < 140; ++cell) ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
}

TEST_P(State, ValuesRestoredBeforeTheirKeysAreRefusedByName) {
  Host host(Small());
  const std::vector<uint16_t> row(host.layer(0).v_row(), 0x3c00u);
  EXPECT_EQ(sparkv_cache_restore_values(host.cache, 0, 7, 1, row.data(), &host.error),
            SPARKV_INVALID);
  EXPECT_NE(std::strstr(host.error.text, "values: cell 7"), nullptr) << host.error.text;
}

TEST_P(State, SequencesRestoredOneAfterTheOtherKeepTheirOwnWeights) {
  Host usual(Small()), host(Small());
  for (Host* h : {&usual, &host}) {
    h->Feed(0, 1, 0, 100, {100});
    h->Feed(1, 2, 0, 100, {100});
  }
  const Saved first = Save(host, 0, 100), second = Save(host, 100, 100);
  sparkv_cache_release(host.cache, 0, 512);
  Load(host, first, 0);
  Load(host, second, 100);
  for (int s = 0; s < 2; ++s) {
    EXPECT_TRUE(Near(host.Feed(s, s + 1, 100, 40, {8}), usual.Feed(s, s + 1, 100, 40, {8}), kSums))
        << "sequence " << s;
  }
  for (int64_t cell = 0; cell < 280; ++cell) ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
}

// A server with many slots clears its cache and reads all of them back.
TEST_P(State, AllRowsOfManySequencesAreKnownAgain) {
  constexpr int kSequences = 12;
  Model model = Small();
  model.cells = kSequences * 60;
  Host host(model), fresh(model);
  for (int s = 0; s < kSequences; ++s) host.Feed(s, s, 0, 60, {60});
  const int64_t sealed = host.Memory().sealed;
  const std::vector<uint8_t> weights = host.Weights();
  const Saved saved = Save(host, 0, kSequences * 60);
  sparkv_cache_clear(host.cache);
  Load(host, saved, 0);
  ASSERT_EQ(sparkv_cache_load_weights(fresh.cache, weights.data(), weights.size(), &fresh.error),
            SPARKV_OK)
      << fresh.error.text;
  Load(fresh, saved, 0);
  for (int s = 0; s < kSequences; ++s) Hold(fresh, s, s, 60, s * 60);
  for (Host* h : {&host, &fresh}) {
    h->Forget(11, 59, 60);
    h->Feed(11, 11, 59, 1, {1});
    EXPECT_EQ(sparkv_cache_unknown_rows(h->cache), 0)
        << (h == &host ? "same process" : "fresh process");
    if (std::strcmp(GetParam().first, "exact") != 0) {
      EXPECT_EQ(h->Memory().sealed, sealed) << (h == &host ? "same process" : "fresh process");
    }
  }
}

class Lossy : public State {};
INSTANTIATE_TEST_SUITE_P(Presets, Lossy,
                         testing::Values(std::pair{"spark-0.5", ""}, std::pair{"spark-0.8", ""},
                                         std::pair{"spark-0.5-i8", ""},
                                         std::pair{"spark-0.5-i5", ""}, std::pair{"tiers-7432", ""},
                                         std::pair{"tiers-5321", ""},
                                         std::pair{"tiers-6321", "1=spark-0.5-i5"},
                                         std::pair{"spark-0.5-i5", "0=spark-0-i8"},
                                         std::pair{"spark-0.5-i5", "recent 29:i8+q8"},
                                         std::pair{"tiers-5321", "recent 22:i8+q8,33:t7432+t4"}));

TEST_P(Lossy, WithoutWeightsPackedRowsStayAsTheyWereReadAndAreCounted) {
  Host usual(Small()), host(Small());
  constexpr int kSaved = 103;  // the next token packs one at most, not four
  usual.Feed(0, 1, 0, kSaved, {kSaved});
  const Saved saved = Save(usual, 0, kSaved);
  Load(host, saved, 0);
  Hold(host, 0, 1, kSaved, 0);
  // The first answer is over the same rows, as f16; those of a stage are coded once more.
  EXPECT_TRUE(Near(host.Feed(0, 1, kSaved, 1, {1}), usual.Feed(0, 1, kSaved, 1, {1}),
                   RecentStages(host.config).empty() ? 5e-2 : 7e-2));
  // Those of a stage are not known by their values, and lose more when they are packed.
  const std::vector<RecentStage> stages = RecentStages(host.config);
  const int64_t packed = kSaved - 4 - (stages.empty() ? 16 : stages.back().until);
  EXPECT_GE(sparkv_cache_unknown_rows(host.cache), packed);
  EXPECT_LE(sparkv_cache_unknown_rows(host.cache), kSaved);
  host.Feed(0, 1, kSaved + 1, 60, {20});
  for (int64_t cell = 4; cell < 4 + packed; ++cell)
    ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << cell;
  EXPECT_GE(host.Memory().sealed, 61 - 16);  // new tokens are packed under new weights
}

void PlainRowsArePackedLater(const char* preset) {
  Model model;
  model.preset = preset;
  model.set = {{"window", "16"}, {"observe", "24"}};
  Host host(model);
  Load(host, Raw(host, 1, 100), 0);
  Hold(host, 0, 1, 100, 0);
  host.Feed(0, 1, 100, 60, {20});
  EXPECT_EQ(sparkv_cache_unknown_rows(host.cache), 0) << preset;
  EXPECT_EQ(host.Memory().sealed, 160 - 16 - 4) << preset;
}

TEST(CacheState, PlainRowsOfAStateFileArePackedLater) {
  for (const char* preset : {"exact", "spark-0.5-i8", "spark-0.5-i5", "tiers-7432"})
    PlainRowsArePackedLater(preset);
}

TEST(CacheState, LoadWeightsTakesNothingFromDamagedOrForeignBytes) {
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "16"}, {"observe", "24"}};
  Host donor(model);
  donor.Feed(0, 1, 0, 60, {60});
  const std::vector<uint8_t> good = donor.Weights();
  const Saved saved = Save(donor, 0, 60);
  Host host(model);
  const size_t empty = sparkv_cache_save_weights(host.cache, nullptr, 0);
  const auto load = [&](const std::vector<uint8_t>& bytes) {
    host.error = {};
    const sparkv_status status =
        sparkv_cache_load_weights(host.cache, bytes.data(), bytes.size(), &host.error);
    if (status != SPARKV_OK) {
      EXPECT_NE(std::strstr(host.error.text, "weights"), nullptr) << host.error.text;
    }
    EXPECT_EQ(std::strchr(host.error.text, '\n'), nullptr);
    return status;
  };
  for (size_t n = 0; n < good.size(); n += n < 40 ? 1 : 37) {
    std::vector<uint8_t> cut(good.begin(), good.begin() + long(n));
    cut.reserve(1);  // never NULL
    ASSERT_EQ(load(cut), SPARKV_CORRUPT) << n;
  }
  std::mt19937 rng(1);
  for (size_t i = 0; i < good.size() + 200; ++i) {
    std::vector<uint8_t> bad = good;
    bad[i < good.size() ? i : rng() % good.size()] ^= uint8_t(1u << (rng() % 8));
    ASSERT_NE(load(bad), SPARKV_OK) << i;
  }
  std::vector<uint8_t> longer = good;
  longer.push_back(0);
  EXPECT_EQ(load(longer), SPARKV_CORRUPT);
  EXPECT_EQ(sparkv_cache_save_weights(host.cache, nullptr, 0), empty);

  Model other = model;
  other.layers[1].k_dim = 96;
  EXPECT_EQ(load(Host(other).Weights()), SPARKV_INVALID);
  other = model;
  other.preset = "spark-0.5-i8";
  EXPECT_EQ(load(Host(other).Weights()), SPARKV_INVALID);
  EXPECT_EQ(sparkv_cache_save_weights(host.cache, nullptr, 0), empty);

  EXPECT_EQ(load(good), SPARKV_OK) << host.error.text;
  Load(host, saved, 0);
  Hold(host, 0, 1, 60, 0);
  EXPECT_EQ(host.Memory().sealed, donor.Memory().sealed);
}

TEST(CacheState, SaveWeightsWritesNothingWhenTheBufferIsTooSmall) {
  Model model;
  model.preset = "spark-0.5-i5";
  Host host(model);
  host.Feed(0, 1, 0, 60, {60});
  const size_t size = sparkv_cache_save_weights(host.cache, nullptr, 0);
  std::vector<uint8_t> bytes(size - 1, 0x5a);
  EXPECT_EQ(sparkv_cache_save_weights(host.cache, bytes.data(), bytes.size()), size);
  EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 0x5a), long(bytes.size()));
}

// ---- copies ----

void CopyAll(Host& host, int from, int to) {
  for (int l = 0; l < host.n_layers(); ++l) {
    ASSERT_EQ(sparkv_cache_copy_keys(host.cache, l, from, to, &host.error), SPARKV_OK)
        << host.error.text;
  }
  for (int l = 0; l < host.n_layers(); ++l) {
    ASSERT_EQ(sparkv_cache_copy_values(host.cache, l, from, to, &host.error), SPARKV_OK)
        << host.error.text;
  }
  host.Forget(to, 0, host.sequence(to).size());
  for (const Placed& token : host.sequence(from)) {
    host.Adopt(to, {token.cell + (to - from) * host.model.cells, token.content});
  }
}

TEST_P(State, ACopiedStreamAndItsSourceContinueOnTheirOwn) {
  for (const int prefix : {10, 70}) {  // before and after weights are made
    Model model = Small();
    model.streams = 3;
    model.split = true;
    model.cells = 200;
    Host host(model);
    host.Feed(2, 8, 0, 90, {45});  // the copy overwrites something
    host.Feed(0, 1, 0, prefix, {9});
    CopyAll(host, 0, 2);
    for (int i = 0; i < prefix; ++i) ASSERT_EQ(host.Rows(400 + i), host.Rows(i)) << i;
    for (int64_t i = prefix; i < 200; ++i) {
      const std::vector<uint16_t> rows = host.Rows(400 + i);
      ASSERT_EQ(std::count(rows.begin(), rows.end(), 0), long(rows.size())) << i;
    }
    const std::vector<Answer> source = host.Feed(0, 1, prefix, 50, {5});
    const std::vector<Answer> copy = host.Feed(2, 3, prefix, 50, {7});

    Host one(Small()), two(Small());
    one.Feed(0, 1, 0, prefix, {prefix});
    two.Feed(0, 1, 0, prefix, {prefix});
    EXPECT_TRUE(Near(source, one.Feed(0, 1, prefix, 50, {50}), kSums)) << prefix;
    EXPECT_TRUE(Near(copy, two.Feed(0, 3, prefix, 50, {50}), kSums)) << prefix;
    for (int64_t i = 0; i < prefix + 50; ++i) {
      ASSERT_EQ(host.Rows(i), one.Rows(i)) << prefix << " token " << i;
      ASSERT_EQ(host.Rows(400 + i), two.Rows(i)) << prefix << " token " << i;
    }
    EXPECT_EQ(host.Memory().tokens, 2 * (prefix + 50));
    sparkv_cache_release(host.cache, 0, 600);
    EXPECT_EQ(host.Memory().tokens, 0);
    EXPECT_EQ(host.Memory().slack, 0u);
  }
}

// ---- rotation ----

// GGML_OP_ROPE in double.
std::vector<double> Rotated(const sparkv_rope& rope, int delta, std::vector<double> k) {
  const double pi = 3.14159265358979323846;
  const auto dim_of = [&](double beta) {
    return rope.n_rot * std::log(rope.n_ctx_orig / (beta * 2 * pi)) /
           (2 * std::log(double(rope.freq_base)));
  };
  const double low = std::max(0.0, std::floor(dim_of(rope.beta_fast)));
  const double high = std::min(rope.n_rot - 1.0, std::ceil(dim_of(rope.beta_slow)));
  for (int i = 0; i < rope.n_rot / 2; ++i) {
    double whole = delta * std::pow(double(rope.freq_base), -2.0 * i / rope.n_rot);
    if (rope.freq_factors != nullptr) whole /= rope.freq_factors[i];
    double theta = whole * rope.freq_scale, magnitude = rope.attn_factor;
    if (rope.ext_factor != 0.0f) {
      const double ramp = 1.0 - std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0);
      const double mix = ramp * rope.ext_factor;
      theta = theta * (1.0 - mix) + whole * mix;
      magnitude *= 1.0 + 0.1 * std::log(1.0 / rope.freq_scale);
    }
    const size_t a = size_t(rope.first_channel + (rope.neox != 0 ? i : 2 * i));
    const size_t b = size_t(rope.first_channel + (rope.neox != 0 ? i + rope.n_rot / 2 : 2 * i + 1));
    const double x = k[a], y = k[b];
    k[a] = (x * std::cos(theta) - y * std::sin(theta)) * magnitude;
    k[b] = (x * std::sin(theta) + y * std::cos(theta)) * magnitude;
  }
  return k;
}

TEST(CacheState, RotatedKeysAreWhatGgmlGives) {
  Model model;
  model.layers = {{2, 64, 32, 1}, {1, 128, 64, 2}};
  model.set = {{"window", "8"}};
  std::vector<float> factors(64);
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = 1.0f + float(i) * 0.1f;
  for (const int neox : {0, 1}) {
    for (const bool with_factors : {false, true}) {
      for (const float ext : {0.0f, 1.0f, 0.7f}) {
        for (const bool part : {false, true}) {
          Host host(model);
          host.Feed(0, 1, 0, 40, {40});
          for (int l = 0; l < 2; ++l) {
            const int dim = host.layer(l).k_dim;
            sparkv_rope rope{};
            rope.struct_size = sizeof(rope);
            rope.n_rot = part ? dim / 2 : dim;
            rope.first_channel = part ? dim / 4 : 0;
            rope.neox = neox;
            rope.n_ctx_orig = 4096;
            rope.freq_base = 10000.0f;
            rope.freq_scale = ext != 0.0f ? 0.25f : 1.0f;
            rope.ext_factor = ext;
            rope.attn_factor = ext != 0.0f ? 1.0f / (1.0f + 0.1f * std::log(4.0f)) : 1.0f;
            rope.beta_fast = 32.0f;
            rope.beta_slow = 1.0f;
            rope.freq_factors = with_factors ? factors.data() : nullptr;
            std::vector<int32_t> delta(40);
            for (int i = 0; i < 40; ++i)
              delta[size_t(i)] = i % 3 == 0 ? 0 : i % 2 == 0 ? -i * 5 : i;
            const std::vector<uint16_t> before = host.Read(kKeys, l, 0, 40),
                                        values = host.Read(kValues, l, 0, 40);
            ASSERT_EQ(sparkv_cache_rotate_keys(host.cache, l, delta.data(), 40, &rope, &host.error),
                      SPARKV_OK)
                << host.error.text;
            const std::vector<uint16_t> after = host.Read(kKeys, l, 0, 40);
            EXPECT_EQ(host.Read(kValues, l, 0, 40), values);
            const size_t row = host.layer(l).k_row();
            for (size_t cell = 0; cell < 40; ++cell) {
              for (size_t h = 0; h < row; h += size_t(dim)) {
                std::vector<double> k;
                for (int j = 0; j < dim; ++j)
                  k.push_back(HalfToFloat(before[cell * row + h + size_t(j)]));
                const std::vector<double> want = Rotated(rope, delta[cell], k);
                for (size_t j = 0; j < size_t(dim); ++j) {
                  const size_t at = cell * row + h + j;
                  if (delta[cell] == 0) {
                    ASSERT_EQ(after[at], before[at]);
                  } else {
                    ASSERT_NEAR(HalfToFloat(after[at]), want[j], 1e-3 * std::fabs(want[j]) + 3e-4)
                        << "neox " << neox << " factors " << with_factors << " ext " << ext
                        << " cell " << cell << " channel " << j;
                  }
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(CacheState, RowsMoveAndAreReadTheSameWithAnyNumberOfThreads) {
  Model model;
  model.preset = "tiers-6321";
  model.set = {{"window", "16"}, {"observe", "8"}, {"recent", "40:i8+q8,90:t7432+t4"}};
  std::vector<std::vector<uint16_t>> rows[2];
  for (const int threads : {1, 3}) {
    Host host(model);
    sparkv_cache_set_threads(host.cache, threads);
    host.Feed(0, 1, 0, 200, {50});
    sparkv_rope rope{sizeof(rope), 32,   0,    1,     4096, 10000.0f,
                     1.0f,         0.0f, 1.0f, 32.0f, 1.0f, nullptr};
    std::vector<int32_t> delta(200, -11);
    ASSERT_EQ(sparkv_cache_rotate_keys(host.cache, 0, delta.data(), 200, &rope, &host.error),
              SPARKV_OK);
    for (int l = 0; l < host.n_layers(); ++l) {
      for (const Kind kind : {kKeys, kValues})
        rows[threads / 3].push_back(host.Read(kind, l, 0, 200));
    }
  }
  EXPECT_EQ(rows[0], rows[1]);
}

TEST(CacheState, APackedKeyThatMovesStaysPackedAndNearItsRotation) {
  Model model;
  model.preset = "spark-0.5-i8";
  model.set = {{"window", "8"}};
  model.layers = {{2, 64, 64, 2}};
  Host host(model);
  host.Feed(0, 1, 0, 80, {80});
  sparkv_rope rope{sizeof(rope), 64, 0, 1, 4096, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f, nullptr};
  const std::vector<uint16_t> before = host.Read(kKeys, 0, 0, 80),
                              values = host.Read(kValues, 0, 0, 80);
  const sparkv_memory m = host.Memory();
  std::vector<int32_t> delta(80, 0);
  for (size_t i = 10; i < 60; ++i) delta[i] = -7;
  ASSERT_EQ(sparkv_cache_rotate_keys(host.cache, 0, delta.data(), 80, &rope, &host.error),
            SPARKV_OK);
  const std::vector<uint16_t> after = host.Read(kKeys, 0, 0, 80);
  EXPECT_EQ(host.Memory().sealed, m.sealed);
  EXPECT_EQ(host.Read(kValues, 0, 0, 80), values);
  double error = 0.0, energy = 0.0;
  for (size_t i = 0; i < after.size(); i += 64) {
    std::vector<double> k;
    for (size_t j = 0; j < 64; ++j) k.push_back(HalfToFloat(before[i + j]));
    const std::vector<double> want = Rotated(rope, delta[i / 128], k);
    for (size_t j = 0; j < 64; ++j) {
      if (delta[i / 128] == 0) {
        ASSERT_EQ(after[i + j], before[i + j]);
      } else {
        error += std::pow(HalfToFloat(after[i + j]) - want[j], 2);
        energy += want[j] * want[j];
      }
    }
  }
  EXPECT_GT(error, 0.0);
  EXPECT_LT(error, energy);
}

}  // namespace
}  // namespace sparkv::test

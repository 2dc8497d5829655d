// The life of rows in a cache: what attention gives, what is packed and when.
#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <thread>

#include "base/half.h"
#include "cache_model.h"
#include "format/row_layout.h"

namespace sparkv::test {
namespace {

// ---- exact ----

TEST(Cache, ExactPresetEqualsTheReferenceWhenSequencesShareAStream) {
  for (const char* window : {"0", "7", "64"}) {
    Model model;
    model.set = {{"window", window}, {"sinks", "3"}};
    model.scatter = true;
    Host host(model);
    std::mt19937 rng(5);
    std::map<int, int> next;
    int64_t most_sealed = 0;
    for (int step = 0; step < 60; ++step) {
      const Step s = host.Begin(Mixed(rng, &next, 5, step % 3 == 0 ? 12 : 3));
      const std::vector<Answer> answers = host.Run(s);
      for (size_t t = 0; t < answers.size(); ++t) {
        ASSERT_TRUE(Near(answers[t], host.Expected(s.sees[t]), kSums))
            << "window " << window << " step " << step << " token " << t;
      }
      most_sealed = std::max(most_sealed, host.Memory().sealed);
      // Cells of a sequence that ends are used again.
      const int gone = int(rng() % 5);
      if (host.sequence(gone).size() > (step % 20 == 19 ? 10 : 80)) {
        host.Forget(gone, 0, host.sequence(gone).size());
        next[gone] += 1000;
      }
    }
    EXPECT_GT(most_sealed, std::strcmp(window, "64") == 0 ? -1 : 50);
  }
}

TEST(Cache, ExactPresetEqualsTheReferenceWhenEverySequenceHasItsStream) {
  Model model;
  model.set = {{"window", "5"}, {"sinks", "1"}};
  model.streams = 4;
  model.split = true;
  model.cells = 100;  // no multiple of 16 or 64
  Host host(model);
  std::mt19937 rng(6);
  std::vector<int> next(4, 0);
  for (int step = 0; step < 25; ++step) {
    const int first = int(rng() % 4), n = 1 + int(rng() % unsigned(4 - first)),
              each = 1 + int(rng() % 5);
    Batch batch;
    for (int s = first; s < first + n; ++s) {
      for (int i = 0; i < each && next[size_t(s)] + each - i <= 100; ++i)
        batch.emplace_back(s, Content(s, next[size_t(s)]++));
    }
    if (int(batch.size()) != n * each) break;
    const Step s = host.Begin(batch);
    const std::vector<Answer> answers = host.Run(s);
    for (size_t t = 0; t < answers.size(); ++t)
      ASSERT_TRUE(Near(answers[t], host.Expected(s.sees[t]), kSums)) << step;
  }
}

TEST(Cache, LongSequenceThatIsSplitAmongTasksEqualsTheReference) {
  Model model;
  model.set = {{"window", "16"}};
  model.layers = {{2, 32, 32, 2}};
  model.cells = 4500;
  Host host(model);
  host.Feed(0, 0, 0, 4400, {512});
  for (const int n : {1, 3, 8, 9}) {
    Batch batch;
    for (int i = 0; i < n; ++i) batch.emplace_back(0, Content(0, 4400 + n * 10 + i));
    const Step step = host.Begin(batch);
    const std::vector<Answer> answers = host.Run(step);
    for (size_t t = 0; t < answers.size(); ++t)
      ASSERT_TRUE(Near(answers[t], host.Expected(step.sees[t]), kSums)) << n;
  }
}

// Distances as a mask has them that is not only 0 and -inf.
void Lean(Host* host, const Batch& batch, Step* step) {
  for (size_t t = 0; t < batch.size(); ++t) {
    for (const Placed& token : host->sequence(batch[t].first)) {
      uint16_t& entry = step->mask[t * size_t(step->n_kv) + size_t(token.cell)];
      if (entry != kHidden)
        entry = FloatToHalf(-0.25f * float((batch[t].second - token.content) % 32));
    }
  }
}

class Together : public testing::TestWithParam<std::pair<const char*, const char*>> {};
INSTANTIATE_TEST_SUITE_P(Presets, Together,
                         testing::Values(std::pair{"exact", "none"}, std::pair{"spark-0.5", "none"},
                                         std::pair{"spark-0.5-i5", "none"},
                                         std::pair{"spark-0-i8", "none"},
                                         std::pair{"tiers-6321", "40:i8+q8,90:t7432+t4"}));

TEST_P(Together, SequencesInOneStreamAreReadAsIfEachWereAlone) {
  Model model;
  model.preset = GetParam().first;
  model.set = {{"window", "16"}, {"observe", "8"}, {"recent", GetParam().second}};
  model.layers = {{2, 32, 32, 2}, {1, 64, 40, 3}};
  model.cells = 3200;
  Host host(model);
  std::deque<Host> alone;
  for (int s = 0; s < 3; ++s) alone.emplace_back(model);
  int next = 0;
  const auto feed = [&](int n, bool lean) {
    Batch batch, own[3];
    for (int i = 0; i < n; ++i) {
      const std::pair token(i % 3, Content(i % 3, next + i / 3));
      batch.push_back(token);
      own[i % 3].push_back(token);
    }
    next += n / 3;
    Step step = host.Begin(batch);
    if (lean) Lean(&host, batch, &step);
    const std::vector<Answer> answers = host.Run(step);
    for (int s = 0; s < 3; ++s) {
      Step one = alone[size_t(s)].Begin(own[s]);
      if (lean) Lean(&alone[size_t(s)], own[s], &one);
      const std::vector<Answer> expected = alone[size_t(s)].Run(one);
      for (size_t t = 0; t < expected.size(); ++t)
        ASSERT_TRUE(Near(answers[t * 3 + size_t(s)], expected[t], 2 * kSums))
            << n << " " << t << " at " << next;
    }
  };
  // Enough for more tiles than one task takes; 66 queries are more than one block.
  for (int i = 0; i < 25; ++i) feed(120, false);
  EXPECT_GT(host.Memory().sealed, 2048);
  for (const bool lean : {false, true}) {
    for (const int n : {3, 6, 9, 66}) feed(n, lean);
  }
}

TEST(Cache, ALayerOfItsOwnHasItsOwnRows) {
  Model model;
  model.preset = "spark-0.8-i4";
  model.set = {{"window", "16"}, {"observe", "24"}, {"layers", "1=exact"}};
  Host host(model);
  host.Feed(0, 1, 0, 150, {50});
  ASSERT_GT(host.Memory().sealed, 100);
  const Step step = host.Begin({{0, Content(1, 150)}});
  const Answer answer = host.Run(step).front(), expected = host.Expected(step.sees.front());
  const auto split = long(host.layer(0).out_row());
  const auto part = [&](const Answer& a, bool second) {
    return second ? Answer(a.begin() + split, a.end()) : Answer(a.begin(), a.begin() + split);
  };
  EXPECT_FALSE(Near(part(answer, false), part(expected, false), 1e-2));
  EXPECT_TRUE(Near(part(answer, true), part(expected, true), kSums));
}

TEST(Cache, LayersAreNamedByTheModelsNumbers) {
  // Weights are those of one key configuration: its fingerprint stands behind their magic.
  const auto fingerprint = [](const char* rules, const int32_t* numbers, sparkv_error* error,
                              const char* protect = "") {
    const sparkv_layer_shape layers[] = {{1, 64, 64}, {1, 64, 64}};
    Model model;
    model.preset = "spark-0.5-i5";
    model.set = {{"layers", rules}, {"protect", protect}};
    const sparkv_config config = MakeConfig(model);
    const sparkv_shape shape{sizeof(shape), 2, layers, 64, 1, numbers, 0};
    sparkv_cache* cache = nullptr;
    if (sparkv_cache_create(&config, &shape, &cache, error) != SPARKV_OK) return uint64_t{0};
    uint64_t header[4];
    EXPECT_EQ(sparkv_cache_save_weights(cache, header, sizeof(header)), sizeof(header));
    sparkv_cache_free(cache);
    return header[1];
  };
  const int32_t numbers[] = {5, 11}, wrong[] = {5, 10000};
  sparkv_error error{};
  const uint64_t none = fingerprint("", nullptr, &error);
  const uint64_t first = fingerprint("0=exact", nullptr, &error);
  EXPECT_NE(first, none);
  EXPECT_EQ(fingerprint("0-4=exact", numbers, &error), none);
  EXPECT_EQ(fingerprint("5=exact", numbers, &error), first);
  EXPECT_EQ(fingerprint("11=exact", numbers, &error), fingerprint("1=exact", nullptr, &error));
  EXPECT_EQ(fingerprint("0=spark-0-i8,1=spark-0-i8", nullptr, &error),
            fingerprint("", numbers, &error, "first:6,last:1"));
  EXPECT_EQ(fingerprint("1=spark-0-i8", nullptr, &error),
            fingerprint("", numbers, &error, "first:5,last:1"));
  EXPECT_EQ(fingerprint("", wrong, &error), 0u);
  EXPECT_STREQ(error.text, "layer: 10000 is outside [0, 9999]");
}

// ---- one answer ----

class OneAnswer : public testing::TestWithParam<const char*> {
 protected:
  Model Small() const {
    Model model;
    model.set = {{"window", "16"}, {"observe", "24"}};
    const std::string text = GetParam();
    if (const size_t recent = text.find(" recent "); recent != text.npos) {
      static std::deque<std::string> names;
      model.preset = names.emplace_back(text.substr(0, recent)).c_str();
      model.set.emplace_back("recent", GetParam() + recent + std::strlen(" recent "));
      return model;
    }
    sparkv_config config{};
    config.struct_size = sizeof(config);
    if (sparkv_config_preset(&config, GetParam(), nullptr) == SPARKV_OK) {
      model.preset = GetParam();
    } else {
      model.set.emplace_back("baseline", GetParam());
    }
    return model;
  }
};
INSTANTIATE_TEST_SUITE_P(Presets, OneAnswer,
                         testing::Values("spark-0.5", "spark-0.8", "spark-0.5-i8", "spark-0.5-i5",
                                         "spark-1-i4", "tiers-7432", "tiers-5321", "kivi-2",
                                         "think-0.5", "spark-0.5-i5 recent 30:i8+q8",
                                         "tiers-5321 recent 20:i8+q8,33:t7543+t4,40:t7432+t3"));

TEST_P(OneAnswer, DoesNotDependOnHowAPromptIsCut) {
  Host whole(Small());
  const std::vector<Answer> answers = whole.Feed(0, 1, 0, 150, {150});
  ASSERT_GT(whole.Memory().sealed, 100);
  for (const std::vector<int>& cuts :
       {std::vector<int>{1}, {7}, {64, 64, 22}, {23, 2, 1, 40}, {24, 1}, {149}}) {
    Host host(Small());
    EXPECT_TRUE(Near(host.Feed(0, 1, 0, 150, cuts), answers, kSums)) << "cut at " << cuts[0];
    EXPECT_EQ(host.Memory().sealed, whole.Memory().sealed);
    for (int64_t cell = 0; cell < 150; ++cell)
      ASSERT_EQ(host.Rows(cell), whole.Rows(cell)) << "cut at " << cuts[0] << " cell " << cell;
    ASSERT_EQ(host.Weights(), whole.Weights());
  }
}

TEST_P(OneAnswer, DoesNotDependOnOtherSequencesNorOnCells) {
  Host alone(Small());
  const std::vector<Answer> answers = alone.Feed(0, 2, 0, 120, {30});

  Model crowded = Small();
  crowded.scatter = true;
  crowded.cells = 700;
  Host host(crowded);
  std::mt19937 rng(8);
  std::map<int, int> next;
  std::vector<Answer> got;
  while (next[2] < 120) {
    Batch batch = Mixed(rng, &next, 5, 20);
    std::erase_if(batch, [](const auto& token) {
      return token.first == 2 && token.second >= Content(2, 120);
    });
    if (batch.empty()) continue;
    const std::vector<Answer> all = host.Decode(batch);
    for (size_t t = 0; t < batch.size(); ++t) {
      if (batch[t].first == 2) got.push_back(all[t]);
    }
  }
  EXPECT_TRUE(Near(got, answers, kSums));
  for (size_t i = 0; i < 120; ++i) {
    ASSERT_EQ(host.Rows(host.sequence(2)[i].cell), alone.Rows(alone.sequence(0)[i].cell))
        << "token " << i;
  }
}

TEST_P(OneAnswer, IsTheSameInStreamsOfItsOwn) {
  Host alone(Small());
  const std::vector<Answer> answers = alone.Feed(0, 1, 0, 90, {30});
  Model model = Small();
  model.split = true;
  model.streams = 3;
  Host host(model);
  std::vector<Answer> got;
  for (int p = 0; p < 90; p += 15) {
    Batch batch;
    for (int s = 0; s < 3; ++s) {
      for (int i = 0; i < 15; ++i) batch.emplace_back(s, Content(s, p + i));
    }
    const std::vector<Answer> all = host.Decode(batch);
    got.insert(got.end(), all.begin() + 15, all.begin() + 30);
  }
  EXPECT_TRUE(Near(got, answers, kSums));
  for (size_t i = 0; i < 90; ++i) {
    ASSERT_EQ(host.Rows(host.sequence(1)[i].cell), alone.Rows(alone.sequence(0)[i].cell))
        << "token " << i;
  }
}

// A host that lends two threads, whatever it is asked for.
void TwoThreads(void (*body)(void*), void* data, unsigned, unsigned) {
  std::thread other(body, data);
  body(data);
  other.join();
}

TEST(Cache, AnswersHaveTheSameBitsForEveryNumberOfThreads) {
  for (const char* preset : {"spark-0.8", "spark-0.5-i5", "tiers-6321"}) {
    const auto run = [&](int threads, sparkv_team team = nullptr) {
      Model model;
      model.preset = preset;
      model.layers = {{3, 64, 64, 1}, {1, 128, 96, 4}};
      model.cells = 2600;
      Host host(model);
      sparkv_cache_set_team(host.cache, team);
      sparkv_cache_set_threads(host.cache, threads);
      std::vector<Answer> answers = host.Feed(0, 3, 0, 2300, {230});
      for (const int n : {2, 5}) {  // few queries over many tiles: tasks are parts of the cells
        const std::vector<Answer> more = host.Feed(0, 3, 2300 + n, n, {n});
        answers.insert(answers.end(), more.begin(), more.end());
      }
      return answers;
    };
    const std::vector<Answer> one = run(1);
    for (const int threads : {2, 5})
      ASSERT_EQ(run(threads), one) << preset << " " << threads << " threads";
    ASSERT_EQ(run(3, TwoThreads), one) << preset << " on a team";
  }
}

TEST_P(OneAnswer, IsNearlyTheSameOnEveryInstructionSetAndHasTheSameRows) {
  std::vector<Answer> first;
  std::vector<uint16_t> rows;
  for (const char* simd : {"plain", "avx2", "avx512", "amx", "neon"}) {
    Model model = Small();
    model.set.emplace_back("simd", simd);
    sparkv_cache* cache = nullptr;
    sparkv_error error{};
    const sparkv_config config = MakeConfig(model);
    const sparkv_layer_shape layer{1, 32, 32};
    const sparkv_shape shape{sizeof(shape), 1, &layer, 16, 1, nullptr, 0};
    const sparkv_status status = sparkv_cache_create(&config, &shape, &cache, &error);
    sparkv_cache_free(cache);
    if (status == SPARKV_UNSUPPORTED) {
      EXPECT_NE(std::strstr(error.text, "simd"), nullptr) << error.text;
      EXPECT_NE(std::strstr(error.text, simd), nullptr) << error.text;
      continue;
    }
    Host host(model);
    EXPECT_STREQ(sparkv_cache_isa(host.cache), simd);
    const std::vector<Answer> answers = host.Feed(0, 1, 0, 100, {33});
    std::vector<uint16_t> all;
    for (int64_t cell = 0; cell < 100; ++cell) {
      const std::vector<uint16_t> row = host.Rows(cell);
      all.insert(all.end(), row.begin(), row.end());
    }
    if (first.empty()) {
      first = answers;
      rows = all;
    }
    EXPECT_TRUE(Near(answers, first, std::strcmp(simd, "amx") == 0 ? kSums : kF32Sums)) << simd;
    EXPECT_EQ(all, rows) << simd;
  }
}

// ---- what is packed, when, and to which bytes ----

// Number of packed tokens after the last of n.
int64_t SealedOf(const sparkv_config& config, int n) {
  if (n - 1 < config.observe) return 0;
  return std::max(0, n - 1 - config.window - config.sinks + 1);
}

TEST(Cache, ATokenIsPackedExactlyWhenItLeavesTheWindow) {
  struct Case {
    const char *window, *sinks, *observe;
  };
  for (const Case c : {Case{"8", "2", "12"},
                       {"8", "0", "1"},
                       {"0", "0", "1"},
                       {"0", "4", "30"},
                       {"40", "3", "5"},
                       {"8", "20", "4"},
                       {"100", "0", "3"},
                       {"3", "1", "1000"}}) {
    Model model;
    model.preset = "spark-0.5-i5";
    model.set = {{"window", c.window}, {"sinks", c.sinks}, {"observe", c.observe}};
    Host host(model);
    for (int n = 1; n <= 60; ++n) {
      host.Feed(0, 4, n - 1, 1, {1});
      ASSERT_EQ(host.Memory().sealed, SealedOf(host.config, n))
          << "window " << c.window << " sinks " << c.sinks << " observe " << c.observe << " tokens "
          << n;
      ASSERT_EQ(host.Memory().tokens, n);
    }
    const int64_t sealed = SealedOf(host.config, 60);
    for (int64_t i = 0; i < 60; ++i) {
      const bool packed = sealed > 0 && i >= host.config.sinks && i < host.config.sinks + sealed;
      ASSERT_EQ(host.Rows(i) == host.RawRows(Content(4, int(i))), !packed) << "token " << i;
    }
  }
}

TEST(Cache, NothingIsPackedInAPrefillThatEndsLater) {
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "8"}, {"sinks", "2"}, {"observe", "4"}, {"seal", "prefill-end"}};
  Host host(model);
  host.Feed(0, 4, 0, 100, {20});
  EXPECT_EQ(host.Memory().sealed, 0);
  for (int64_t i = 0; i < 100; ++i) ASSERT_EQ(host.Rows(i), host.RawRows(Content(4, int(i))));
  host.Feed(0, 4, 100, 1, {1});
  EXPECT_EQ(host.Memory().sealed, 101 - 8 - 2);
  host.Feed(0, 4, 101, 30, {10});
  EXPECT_EQ(host.Memory().sealed, 131 - 8 - 2);
}

// The weights of the newest sequence.
std::vector<uint16_t> NewestTable(const Host& host) {
  const std::vector<uint8_t> bytes = host.Weights();
  std::vector<uint16_t> table(TableNumbers(bytes));
  EXPECT_GE(bytes.size(), 32 + table.size() * 2);
  std::memcpy(table.data(), bytes.data() + 32, table.size() * 2);
  return table;
}

// A page of blank lines at the beginning of a text: weights from one token over and over would fit
// no other.
TEST(Cache, TokensThatRepeatHaveNoSayInTheWeights) {
  for (const char* preset : {"tiers-6321", "spark-0.5-i5"}) {
    Model model;
    model.preset = preset;
    model.cells = 1024;
    model.set = {{"window", "8"}, {"sinks", "1"}, {"observe", "4"}};
    Host plain(model);
    plain.Feed(0, 5, 0, 60, {60});
    for (const int cut : {1, 7, 64}) {
      Host repeating(model);
      Batch batch;
      for (int i = 0; i < 30; ++i) batch.emplace_back(0, Content(5, 0));
      for (int i = 1; i < 60; ++i) {
        batch.emplace_back(0, Content(5, i));
        batch.emplace_back(0, Content(5, i / 3));  // two thirds of these repeat, too
      }
      for (size_t i = 0; i < batch.size(); i += size_t(cut)) {
        repeating.Decode(Batch(batch.begin() + long(i),
                               batch.begin() + long(std::min(batch.size(), i + size_t(cut)))));
      }
      EXPECT_EQ(NewestTable(repeating), NewestTable(plain)) << preset << " cut " << cut;
    }
    // Nothing but one token: packed by its weights after 512, for lack of better ones.
    Host alike(model);
    const bool fours = TierBits(sparkv_number(alike.config.kept), 0) > 0;
    for (const auto& [n, packed] : {std::pair(512, 0), std::pair(40, 552 - 8 - (fours ? 0 : 1))}) {
      for (int i = 0; i < n; i += 8) alike.Decode(Batch(8, {0, Content(5, 0)}));
      EXPECT_EQ(alike.Memory().sealed, packed) << preset;
    }
  }
}

// u of one KV head from the first queries of a text.
std::vector<float> Observed(const Host& host, int text, int l, int head) {
  const Layer& layer = host.layer(l);
  const size_t dim = size_t(layer.k_dim), n = size_t(host.config.observe);
  std::vector<float> q(size_t(layer.group) * n * dim), u(dim);
  for (size_t t = 0; t < n; ++t) {
    const std::vector<float> row = Numbers(Content(text, int(t)), kQueries, l, layer.q_row());
    for (size_t g = 0; g < size_t(layer.group); ++g) {
      const float* from = row.data() + (size_t(head * layer.group) + g) * dim;
      std::copy_n(from, dim, q.data() + (g * n + t) * dim);
    }
  }
  const bool tiers = TierBits(sparkv_number(host.config.kept), 0) > 0;
  EXPECT_EQ(sparkv_channel_weight(q.data(), layer.group, int(n), layer.k_dim,
                                  tiers ? SPARKV_GROUP_ENERGY : sparkv_group(host.config.group),
                                  u.data(), nullptr),
            SPARKV_OK);
  return u;
}

TEST_P(OneAnswer, PackedRowsAreThoseOfPackKeyUnderTheWeightsOfTheFirstQueries) {
  if (Small().preset == std::string("exact")) GTEST_SKIP() << "a baseline: baseline_test.cc";
  if (std::strstr(GetParam(), "recent") != nullptr) GTEST_SKIP() << "coded on the way";
  Host host(Small());
  host.Feed(0, 5, 0, 100, {100});
  const std::vector<uint16_t> table = NewestTable(host);
  size_t channels = 0, at = 0;
  for (const Layer& layer : host.model.layers) channels += layer.k_row();
  ASSERT_EQ(table.size() % channels, 0u);
  const size_t parts = table.size() / channels;
  ASSERT_GE(parts, 1u);
  for (int l = 0; l < host.n_layers(); ++l) {
    const Layer& layer = host.layer(l);
    const size_t dim = size_t(layer.k_dim), v_dim = size_t(layer.v_dim);
    for (int h = 0; h < layer.n_kv_heads; ++h, at += parts * dim) {
      // What a pruned channel is restored to falls with the root of its weight; tiers scale a
      // channel by its weight, and use three bits of it.
      const std::vector<float> u = Observed(host, 5, l, h);
      const bool tiers = TierBits(sparkv_number(host.config.kept), 0) > 0;
      const auto unit_of = [&](size_t j) {
        return HalfToFloat(table[at + j]) * (tiers ? double(u[j]) : std::sqrt(double(u[j])));
      };
      const double unit = unit_of(0);
      for (size_t j = 0; j < dim; ++j) {
        ASSERT_NEAR(unit_of(j), unit, unit * (tiers ? 1.2e-2 : 3e-3))
            << "layer " << l << " channel " << j;
      }
      for (int t = host.config.sinks; t < 100 - host.config.window; ++t) {
        const std::vector<uint16_t> k = Halves(Numbers(Content(5, t), kKeys, l, layer.k_row()));
        const std::vector<uint16_t> v = Halves(Numbers(Content(5, t), kValues, l, layer.v_row()));
        std::vector<uint8_t> k_row(sparkv_key_row_bytes(&host.config, layer.k_dim));
        std::vector<uint8_t> v_row(sparkv_value_row_bytes(&host.config, layer.v_dim));
        std::vector<uint16_t> k_back(dim), v_back(v_dim);
        ASSERT_EQ(sparkv_pack_key(&host.config, &table[at], &k[size_t(h) * dim], layer.k_dim,
                                  k_row.data(), k_row.size(), &host.error),
                  SPARKV_OK)
            << host.error.text;
        ASSERT_EQ(sparkv_unpack_key(&host.config, &table[at], k_row.data(), k_row.size(),
                                    layer.k_dim, k_back.data(), &host.error),
                  SPARKV_OK)
            << host.error.text;
        ASSERT_EQ(sparkv_pack_value(&host.config, &v[size_t(h) * v_dim], layer.v_dim, v_row.data(),
                                    v_row.size(), &host.error),
                  SPARKV_OK);
        ASSERT_EQ(sparkv_unpack_value(&host.config, v_row.data(), v_row.size(), layer.v_dim,
                                      v_back.data(), &host.error),
                  SPARKV_OK);
        const std::vector<uint16_t> keys = host.Read(kKeys, l, t, 1),
                                    values = host.Read(kValues, l, t, 1);
        ASSERT_TRUE(std::equal(k_back.begin(), k_back.end(), keys.begin() + long(size_t(h) * dim)))
            << "layer " << l << " token " << t;
        ASSERT_TRUE(
            std::equal(v_back.begin(), v_back.end(), values.begin() + long(size_t(h) * v_dim)))
            << "layer " << l << " token " << t;
      }
    }
  }
}

// Attention over the rows the cache gives back is what it answered.
TEST_P(OneAnswer, AnswersWithTheRowsThatItGivesBack) {
  Host host(Small());
  host.Feed(0, 6, 0, 130, {17});
  const Step step = host.Begin({{0, Content(6, 130)}});
  const std::vector<Answer> answers = host.Run(step);
  const int64_t n = int64_t(host.sequence(0).size());
  Answer want;
  for (int l = 0; l < host.n_layers(); ++l) {
    const Layer& layer = host.layer(l);
    std::vector<float> k, v;
    for (const uint16_t x : host.Read(kKeys, l, 0, n)) k.push_back(HalfToFloat(x));
    for (const uint16_t x : host.Read(kValues, l, 0, n)) v.push_back(HalfToFloat(x));
    const std::vector<float> q = Numbers(Content(6, 130), kQueries, l, layer.q_row());
    reference::Attention args;
    args.n_heads = layer.n_heads();
    args.n_kv_heads = layer.n_kv_heads;
    args.n_kv = int(n);
    args.k_dim = layer.k_dim;
    args.v_dim = layer.v_dim;
    args.scale = layer.scale();
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    for (const double x : reference::Attend(args)) want.push_back(float(x));
  }
  EXPECT_TRUE(Near(answers[0], want, 2e-3));  // rows come back rounded to f16
}

// ---- hosts that do not follow the usual order ----

TEST(Cache, TheOrderOfLayersDoesNotMatter) {
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "8"}, {"observe", "8"}};
  model.layers = {{2, 32, 40, 3}, {1, 64, 32, 2}, {1, 96, 128, 1}};
  Host host(model), odd(model);
  for (int p = 0; p < 60; p += 6) {
    Batch batch;
    for (int i = 0; i < 6; ++i) batch.emplace_back(0, Content(0, p + i));
    host.Decode(batch);
    const Step step = odd.Begin(batch);
    for (const int l : {2, 0, 1}) {
      std::vector<float> out;
      ASSERT_EQ(odd.Write(step, l, kKeys), SPARKV_OK);
      ASSERT_EQ(odd.Write(step, l, kValues), SPARKV_OK);
      ASSERT_EQ(odd.Attend(step, l, &out), SPARKV_OK);
    }
  }
  for (int64_t cell = 0; cell < 60; ++cell) ASSERT_EQ(host.Rows(cell), odd.Rows(cell)) << cell;
}

TEST(Cache, AttendingALayerAgainGivesTheSameAnswer) {
  Model model;
  model.set = {{"window", "8"}};
  Host host(model);
  host.Feed(0, 0, 0, 40, {13});
  const Step step = host.Begin({{0, Content(0, 40)}, {0, Content(0, 41)}});
  std::vector<float> first, again;
  std::vector<Answer> answers(2);
  for (int l = 0; l < 2; ++l) {
    ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
    ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
    ASSERT_EQ(host.Attend(step, l, &first), SPARKV_OK);
    const auto row = long(host.layer(l).out_row());
    for (size_t t = 0; t < 2; ++t) {
      answers[t].insert(answers[t].end(), first.begin() + long(t) * row,
                        first.begin() + long(t + 1) * row);
    }
    for (int i = 0; i < 2; ++i) {
      ASSERT_EQ(host.Attend(step, l, &again), SPARKV_OK) << host.error.text;
      EXPECT_TRUE(Near(again, first, kSums)) << "layer " << l;
    }
  }
  for (size_t t = 0; t < 2; ++t)
    EXPECT_TRUE(Near(answers[t], host.Expected(step.sees[t]), kSums)) << t;
  host.Feed(0, 0, 42, 1, {1});
  EXPECT_EQ(host.Memory().tokens, 43);
}

TEST(Cache, AnotherMaskInTheSameStepIsObeyed) {
  Model model;
  model.set = {{"window", "8"}};
  Host host(model);
  host.Feed(0, 0, 0, 40, {40});
  const Step step = host.Begin({{0, Content(0, 40)}});
  Step half = step;
  half.sees[0].erase(half.sees[0].begin(), half.sees[0].begin() + 20);
  for (int i = 0; i < 20; ++i) half.mask[size_t(i)] = kHidden;
  Answer all, some;
  for (int l = 0; l < 2; ++l) {
    std::vector<float> out;
    ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
    ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
    ASSERT_EQ(host.Attend(step, l, &out), SPARKV_OK);
    all.insert(all.end(), out.begin(), out.end());
    ASSERT_EQ(host.Attend(half, l, &out), SPARKV_OK);
    some.insert(some.end(), out.begin(), out.end());
  }
  EXPECT_TRUE(Near(all, host.Expected(step.sees[0]), kSums));
  EXPECT_TRUE(Near(some, host.Expected(half.sees[0]), kSums));
}

TEST(Cache, TokensWrittenWithoutAttentionAreSeenLater) {
  Model model;
  model.set = {{"window", "4"}};
  Host host(model);
  for (int p = 0; p < 12; p += 4) {
    Batch batch;
    for (int i = 0; i < 4; ++i) batch.emplace_back(0, Content(0, p + i));
    const Step step = host.Begin(batch);
    for (int l = 0; l < 2; ++l) {
      ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
      ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
    }
  }
  const Step step = host.Begin({{0, Content(0, 12)}, {0, Content(0, 13)}});
  const std::vector<Answer> answers = host.Run(step);
  for (size_t t = 0; t < 2; ++t) EXPECT_TRUE(Near(answers[t], host.Expected(step.sees[t]), kSums));
  EXPECT_EQ(host.Memory().tokens, 14);
}

TEST(Cache, LayersWrittenAheadAreRefusedByName) {
  Host host(Model{});
  const Step step = host.Begin({{0, Content(0, 0)}});
  for (int l = 0; l < 2; ++l) {
    ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
    ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
  }
  std::vector<float> out;
  EXPECT_EQ(host.Attend(step, 0, &out), SPARKV_INVALID);
  EXPECT_NE(std::strstr(host.error.text, "layer: 0"), nullptr) << host.error.text;
}

TEST(Cache, ValuesWithoutKeysAreRefusedByName) {
  Host host(Model{});
  host.Feed(0, 0, 0, 5, {5});
  const Step step = host.Begin({{0, Content(0, 5)}});
  EXPECT_EQ(host.Write(step, 0, kValues), SPARKV_INVALID);
  EXPECT_NE(std::strstr(host.error.text, "values"), nullptr) << host.error.text;
  const std::vector<Answer> answers = host.Run(step);
  EXPECT_TRUE(Near(answers[0], host.Expected(step.sees[0]), kSums));
}

// llama.cpp may abort a graph between layers; what was there before must be whole.
TEST(Cache, AStepThatStopsHalfwayLeavesOlderTokensWhole) {
  for (const char* preset : {"exact", "spark-0.5-i5", "tiers-7543"}) {
    Model model;
    model.preset = preset;
    model.set = {{"window", "8"}, {"observe", "8"}};
    Host host(model), usual(model);
    host.Feed(0, 0, 0, 40, {10});
    usual.Feed(0, 0, 0, 40, {10});
    Batch batch;
    for (int i = 0; i < 10; ++i) batch.emplace_back(0, Content(0, 40 + i));
    const Step step = host.Begin(batch);
    std::vector<float> out;
    ASSERT_EQ(host.Write(step, 0, kKeys), SPARKV_OK);
    ASSERT_EQ(host.Write(step, 0, kValues), SPARKV_OK);
    ASSERT_EQ(host.Attend(step, 0, &out), SPARKV_OK);
    host.Forget(0, 40, 50);  // the host takes the micro-batch back and tries again
    const std::vector<Answer> answers = host.Decode(batch), want = usual.Decode(batch);
    EXPECT_TRUE(Near(answers, want, kSums)) << preset;
    for (int64_t cell = 0; cell < 50; ++cell)
      ASSERT_EQ(host.Rows(cell), usual.Rows(cell)) << preset << " cell " << cell;
  }
}

TEST(Cache, ALayerThatThisStepDidNotWriteCanBeAttended) {
  Model model;
  model.layers = {{1, 32, 32, 1}, {2, 256, 256, 1}};
  model.set = {{"window", "8"}, {"simd", "plain"}};  // AddressSanitizer does not see masked loads
  Host host(model);
  const Step step = host.Begin({{0, Content(0, 0)}, {0, Content(0, 1)}});
  std::vector<float> out;
  ASSERT_EQ(host.Write(step, 0, kKeys), SPARKV_OK);
  ASSERT_EQ(host.Write(step, 0, kValues), SPARKV_OK);
  ASSERT_EQ(host.Attend(step, 0, &out), SPARKV_OK);
  // Any numbers, but only from bytes that are the cache's own.
  EXPECT_EQ(host.Attend(step, 1, &out), SPARKV_OK);
  host.Forget(0, 0, 2);
  const Step next = host.Begin({{0, Content(0, 2)}});
  EXPECT_TRUE(Near(host.Run(next)[0], host.Expected(next.sees[0]), kSums));
}

TEST(Cache, StreamsOfOneStepMayBeAttendedOneByOne) {
  Model model;
  model.streams = 2;
  model.split = true;
  model.set = {{"window", "4"}, {"sinks", "0"}};
  Host host(model);
  for (int p = 0; p < 20; p += 2) {
    const Step step = host.Begin(
        {{0, Content(0, p)}, {0, Content(0, p + 1)}, {1, Content(1, p)}, {1, Content(1, p + 1)}});
    std::vector<Answer> answers(4);
    for (int l = 0; l < 2; ++l) {
      ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
      ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
      for (int s = 0; s < 2; ++s) {
        std::vector<float> out;
        ASSERT_EQ(host.Attend(OneStream(step, s), l, &out), SPARKV_OK) << host.error.text;
        const auto row = long(host.layer(l).out_row());
        for (int t = 0; t < 2; ++t) {
          Answer& answer = answers[size_t(s * 2 + t)];
          answer.insert(answer.end(), out.begin() + t * row, out.begin() + (t + 1) * row);
        }
      }
    }
    for (size_t t = 0; t < 4; ++t)
      ASSERT_TRUE(Near(answers[t], host.Expected(step.sees[t]), kSums)) << p << " token " << t;
  }
}

TEST(Cache, NegativeCellsAreSkipped) {
  Host host(Model{});
  host.Feed(0, 0, 0, 6, {6});
  Step step = host.Begin({{0, Content(0, 6)}, {0, Content(0, 7)}});
  const int64_t skipped = step.cells[0];
  step.cells[0] = -1;
  for (size_t t = 0; t < 2; ++t) step.mask[t * size_t(step.n_kv) + size_t(skipped)] = kHidden;
  const std::vector<Answer> answers = host.Run(step);
  std::erase(step.sees[1], Content(0, 6));
  EXPECT_TRUE(Near(answers[1], host.Expected(step.sees[1]), kSums));
  EXPECT_EQ(host.Memory().tokens, 7);
}

}  // namespace
}  // namespace sparkv::test

// Eviction: which rows the heads keep, what attention then gives, and what becomes of the memory.
#include "method/evict.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <limits>
#include <set>

#include "cache_model.h"

namespace sparkv::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- the method ----

TEST(Evict, TheHighestScoresStayAndOfEqualsTheLater) {
  EXPECT_EQ(SelectRows({1, 3, 2, 3, 0}, 2), (std::vector<uint8_t>{0, 1, 0, 1, 0}));
  EXPECT_EQ(SelectRows({5, 5, 5, 5}, 2), (std::vector<uint8_t>{0, 0, 1, 1}));
  EXPECT_EQ(SelectRows({NAN, -kInf, 1}, 1), (std::vector<uint8_t>{0, 0, 1}));
  EXPECT_EQ(SelectRows({1, 2}, 0), (std::vector<uint8_t>{0, 0}));
  EXPECT_EQ(SelectRows({1, 2}, 9), (std::vector<uint8_t>{1, 1}));
  EXPECT_TRUE(SelectRows({}, 3).empty());
}

TEST(Evict, AttentionIsASoftmaxOverAllLogits) {
  std::vector<float> logits = {0.0f, std::log(3.0f), -kInf, std::log(4.0f)}, score = {1, 1, 1};
  AddAttention(logits.data(), 4, 3, score.data());
  EXPECT_NEAR(score[0], 1.125, 1e-6);
  EXPECT_NEAR(score[1], 1.375, 1e-6);
  EXPECT_EQ(score[2], 1.0f);
  logits.assign(4, -kInf);
  AddAttention(logits.data(), 4, 3, score.data());
  EXPECT_EQ(score[2], 1.0f);
}

TEST(Evict, PoolingAddsNeighbours) {
  std::vector<float> score = {5, 0, 0, 0, 0, 10};
  PoolScores(&score, 5);
  EXPECT_EQ(score, (std::vector<float>{1, 1, 1, 2, 2, 2}));
}

TEST(Evict, PyramidFallsOverTheLayersAndKeepsItsMean) {
  const std::vector<int64_t> rows = LayerRows(SPARKV_EVICT_PYRAMIDKV, 100, 10000, 30);
  EXPECT_EQ(rows.front(), 195);
  EXPECT_EQ(rows.back(), 5);
  EXPECT_TRUE(std::is_sorted(rows.rbegin(), rows.rend()));
  EXPECT_EQ(std::accumulate(rows.begin(), rows.end(), int64_t{0}), 3000);
  // What the first layers have not, the others share: never fewer in all (docs/method.md, section
  // 12).
  const std::vector<int64_t> capped = LayerRows(SPARKV_EVICT_PYRAMIDKV, 100, 120, 30);
  EXPECT_EQ(capped.front(), 120);
  EXPECT_EQ(std::accumulate(capped.begin(), capped.end(), int64_t{0}), 3000);
  EXPECT_EQ(LayerRows(SPARKV_EVICT_PYRAMIDKV, 100, 80, 2), (std::vector<int64_t>{80, 80}));
  EXPECT_EQ(LayerRows(SPARKV_EVICT_SNAPKV, 7, 80, 3), (std::vector<int64_t>{7, 7, 7}));
  EXPECT_EQ(LayerRows(SPARKV_EVICT_PYRAMIDKV, 7, 80, 1), (std::vector<int64_t>{7}));
}

// ---- in the cache ----

constexpr int kPrompt = 300, kSinks = 4, kWindow = 40, kObserve = 24;

Model Evicting(const char* preset, const char* evict) {
  Model model;
  model.preset = preset;
  model.set = {{"sinks", "4"}, {"window", "40"}, {"observe", "24"}, {"evict", evict}};
  if (const char* recent = std::strstr(preset, " recent "); recent != nullptr) {
    static std::deque<std::string> names;
    model.preset = names.emplace_back(preset, recent).c_str();
    model.set[1].second = "20";
    model.set.emplace_back("recent", recent + std::strlen(" recent "));
  }
  model.cells = 512;
  return model;
}

// Which rows a head keeps: a row that it evicted reads as -0 in every channel.
std::set<int64_t> KeptBy(Host& host, int l, int head, int64_t n) {
  const Layer& layer = host.layer(l);
  const std::vector<uint16_t> keys = host.Read(kKeys, l, 0, n);
  std::set<int64_t> kept;
  for (int64_t i = 0; i < n; ++i) {
    const auto row = keys.begin() + i * long(layer.k_row()) + head * layer.k_dim;
    if (!std::all_of(row, row + layer.k_dim, [](uint16_t x) { return x == 0x8000u; }))
      kept.insert(i);
  }
  return kept;
}

// Scores in double precision, from raw rows: token i of `n` in cell i, candidates first..last-1.
std::vector<double> Scores(const Host& host, const std::string& method, int l, int head, int first,
                           int last, int newest) {
  const Layer& layer = host.layer(l);
  const auto key = [&](int i) {
    const std::vector<float> row = Numbers(Content(1, i), kKeys, l, layer.k_row());
    return std::vector<double>(row.begin() + head * layer.k_dim,
                               row.begin() + (head + 1) * layer.k_dim);
  };
  const auto norm = [](const std::vector<double>& k) {
    return std::sqrt(std::inner_product(k.begin(), k.end(), k.begin(), 0.0));
  };
  std::vector<double> score(size_t(last - first), 0.0), anchor(size_t(layer.k_dim), 0.0);
  if (method == "streamingllm") std::iota(score.begin(), score.end(), 0.0);
  for (int i = first; i < last; ++i) {
    if (method == "knorm") score[size_t(i - first)] = -norm(key(i));
    for (int j = 0; j < layer.k_dim; ++j) anchor[size_t(j)] += key(i)[size_t(j)] / norm(key(i));
  }
  for (int i = first; i < last && method == "keydiff"; ++i) {
    const std::vector<double> k = key(i);
    score[size_t(i - first)] =
        -std::inner_product(k.begin(), k.end(), anchor.begin(), 0.0) / norm(k);
  }
  if (method == "expected") {
    // The mean of e^(q . k) over normal queries with the moments of the newest ones.
    for (int g = 0; g < layer.group; ++g) {
      std::vector<double> logit(score.size(), 0.0);
      for (int j = 0; j < layer.k_dim; ++j) {
        double sum = 0.0, squares = 0.0;
        for (int t = newest - kObserve + 1; t <= newest; ++t) {
          const std::vector<float> q = Numbers(Content(1, t), kQueries, l, layer.q_row());
          const double x =
              double(q[size_t((head * layer.group + g) * layer.k_dim + j)]) * double(layer.scale());
          sum += x;
          squares += x * x;
        }
        const double mean = sum / kObserve, variance = squares / kObserve - mean * mean;
        for (int i = first; i < last; ++i) {
          const double k = key(i)[size_t(j)];
          logit[size_t(i - first)] += mean * k + variance * k * k / 2;
        }
      }
      double sum = 0.0;
      for (const double x : logit) sum += std::exp(x);
      for (size_t i = 0; i < score.size(); ++i) score[i] += std::exp(logit[i]) / sum;
    }
    for (int i = first; i < last; ++i) {
      const std::vector<float> v = Numbers(Content(1, i), kValues, l, layer.v_row());
      double square = 0.0;
      for (int j = 0; j < layer.v_dim; ++j)
        square += std::pow(double(v[size_t(head * layer.v_dim + j)]), 2);
      score[size_t(i - first)] *= std::sqrt(square);
    }
    return score;
  }
  if (method != "snapkv" && method != "tova") return score;
  std::vector<std::vector<double>> keys;
  for (int i = 0; i <= newest; ++i) keys.push_back(key(i));
  for (int from = method == "tova" ? newest : newest - kObserve + 1; from <= newest; ++from) {
    const std::vector<float> q = Numbers(Content(1, from), kQueries, l, layer.q_row());
    for (int g = 0; g < layer.group; ++g) {
      std::vector<double> weight;
      for (int i = 0; i <= from; ++i) {
        weight.push_back(
            std::exp(layer.scale() *
                     std::inner_product(keys[size_t(i)].begin(), keys[size_t(i)].end(),
                                        q.begin() + (head * layer.group + g) * layer.k_dim, 0.0)));
      }
      const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
      for (int i = first; i < last; ++i) score[size_t(i - first)] += weight[size_t(i)] / sum;
    }
  }
  if (method == "tova") return score;
  std::vector<double> pooled(score.size(), 0.0);
  for (int i = 0; i < int(score.size()); ++i) {
    for (int j = std::max(0, i - 2); j <= std::min(int(score.size()) - 1, i + 2); ++j)
      pooled[size_t(i)] += score[size_t(j)];
  }
  return pooled;
}

// One query of every head over the rows that the head keeps, in double precision.
Answer Over(const Host& host, const std::vector<std::set<int64_t>>& kept, uint64_t content) {
  Answer answer;
  size_t list = 0;
  for (int l = 0; l < host.n_layers(); ++l) {
    const Layer& layer = host.layer(l);
    const std::vector<float> q = Numbers(content, kQueries, l, layer.q_row());
    for (int h = 0; h < layer.n_kv_heads; ++h, ++list) {
      std::vector<float> k, v;
      for (const int64_t i : kept[list]) {
        const uint64_t token = Content(1, int(i));
        const std::vector<float> key = Numbers(token, kKeys, l, layer.k_row());
        const std::vector<float> value = Numbers(token, kValues, l, layer.v_row());
        k.insert(k.end(), key.begin() + h * layer.k_dim, key.begin() + (h + 1) * layer.k_dim);
        v.insert(v.end(), value.begin() + h * layer.v_dim, value.begin() + (h + 1) * layer.v_dim);
      }
      reference::Attention args;
      args.n_heads = layer.group;
      args.n_kv_heads = 1;
      args.n_kv = int(kept[list].size());
      args.k_dim = layer.k_dim;
      args.v_dim = layer.v_dim;
      args.scale = layer.scale();
      args.q = q.data() + h * layer.group * layer.k_dim;
      args.k = k.data();
      args.v = v.data();
      for (const double x : reference::Attend(args)) answer.push_back(float(x));
    }
  }
  return answer;
}

std::vector<std::set<int64_t>> AllKept(Host& host, int64_t n) {
  std::vector<std::set<int64_t>> kept;
  for (int l = 0; l < host.n_layers(); ++l) {
    for (int h = 0; h < host.layer(l).n_kv_heads; ++h) kept.push_back(KeptBy(host, l, h, n));
  }
  return kept;
}

class EvictMethod : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Methods, EvictMethod,
                         testing::Values("streamingllm", "tova", "knorm", "keydiff", "snapkv",
                                         "expected"));

TEST_P(EvictMethod, HeadsKeepTheBestScoresAndAttentionReadsNothingElse) {
  const std::string method = GetParam(), evict = method + ":100";
  Host host(Evicting("exact", evict.c_str()));
  host.Feed(0, 1, 0, kPrompt, {128});
  EXPECT_EQ(host.Memory().evicted, 0);
  host.Feed(0, 1, kPrompt, 1, {1});  // the prompt has ended
  // Rows 4 .. 260 had left the window when the first token was alone.
  const int first = kSinks, last = kPrompt - kWindow + 1;
  EXPECT_EQ(host.Memory().evicted, last - first - 1);
  EXPECT_EQ(host.Memory().tokens, kPrompt + 1);
  const std::vector<std::set<int64_t>> kept = AllKept(host, kPrompt + 1);
  size_t list = 0;
  for (int l = 0; l < host.n_layers(); ++l) {
    for (int h = 0; h < host.layer(l).n_kv_heads; ++h, ++list) {
      std::vector<double> score = Scores(host, method, l, h, first, last - 1, kPrompt);
      if (method == "tova") {  // one choice for all heads of a layer
        for (int other = 0; other < host.layer(l).n_kv_heads; ++other) {
          const std::vector<double> more = Scores(host, method, l, other, first, last - 1, kPrompt);
          for (size_t i = 0; i < score.size() && other != h; ++i) score[i] += more[i];
        }
      }
      double least_kept = kInf, most_evicted = -kInf;
      int64_t n = 0;
      for (int i = first; i < last - 1; ++i) {
        const double s = score[size_t(i - first)];
        if (kept[list].count(i) != 0) {
          ++n;
          least_kept = std::min(least_kept, s);
        } else {
          most_evicted = std::max(most_evicted, s);
        }
      }
      // The token that ended the prompt packed one more row, which nobody judged yet.
      EXPECT_EQ(kept[list].size(), 101u) << l << " " << h;
      EXPECT_GT(n, 50);
      EXPECT_GT(least_kept, most_evicted - 1e-4 * std::abs(most_evicted)) << l << " " << h;
    }
  }
  for (const int more : {1, 3}) {
    Batch batch;
    const int at = int(host.sequence(0).size());
    for (int i = 0; i < more; ++i) batch.emplace_back(0, Content(1, at + i));
    const Step step = host.Begin(batch);
    const std::vector<Answer> answers = host.Run(step);
    std::vector<std::set<int64_t>> sees = kept;
    for (int i = 0; i < more; ++i) {
      for (auto& list_sees : sees) {
        for (int64_t token = kPrompt + 1; token <= at + i; ++token) list_sees.insert(token);
      }
      EXPECT_TRUE(Near(answers[size_t(i)], Over(host, sees, Content(1, at + i)), kSums)) << i;
    }
  }
}

class EvictPreset : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Presets, EvictPreset,
                         testing::Values("exact", "spark-0.5", "spark-0.8-i4", "spark-0.5-i5",
                                         "tiers-7432", "tiers-6321 recent 30:i8+q8,40:t7432+t4"));

TEST_P(EvictPreset, BytesShrinkAndTheReportCountsThem) {
  Host all(Evicting(GetParam(), "none")), some(Evicting(GetParam(), "snapkv:80"));
  for (Host* host : {&all, &some}) {
    host->Feed(0, 1, 0, kPrompt, {128});
    host->Feed(0, 1, kPrompt, 2, {1});
  }
  const sparkv_memory a = all.Memory(), b = some.Memory();
  EXPECT_EQ(a.tokens, b.tokens);
  const auto rows = [](const sparkv_memory& m) {
    return m.key_masks + m.key_signs + m.key_scales + m.key_kept + m.value_scales + m.value_codes;
  };
  // 36 of 257 packed rows stay (80 less 44 dense ones), and the rows packed since; tokens that are
  // packed by fours leave up to three fewer dense.
  const bool fours = TierBits(sparkv_number(all.config.kept), 0) > 0;
  EXPECT_LT(rows(b), rows(a) * (fours ? 44 : 38) / 257);
  EXPECT_GT(rows(b), rows(a) * 36 / 257);
  EXPECT_LT(b.bits, a.bits);
  EXPECT_EQ(b.resident,
            rows(b) + b.dense_keys + b.dense_values + b.tables + b.cells + b.slack + b.workspace);
}

TEST_P(EvictPreset, ALongAnswerStaysWithinTheBudget) {
  Host host(Evicting(GetParam(), "snapkv:80"));
  host.Feed(0, 1, 0, 100, {100});
  int64_t most = 0;
  for (int i = 0; i < 350; ++i) {
    host.Feed(0, 1, 100 + i, 1, {1});
    most = std::max(most, host.Memory().sealed);
  }
  EXPECT_LE(most, 128);
  for (const auto& kept : AllKept(host, 450)) EXPECT_LE(kept.size(), 80u + 128u);
}

// Threads, and how a prompt is cut, change nothing.
TEST_P(EvictPreset, OneAnswerHoweverThePromptIsCut) {
  Model model = Evicting(GetParam(), "snapkv:90");
  Host whole(model), cut(model);
  sparkv_cache_set_threads(cut.cache, 3);
  whole.Feed(0, 1, 0, kPrompt, {kPrompt});
  cut.Feed(0, 1, 0, kPrompt, {7, 64, 30});
  const std::vector<Answer> a = whole.Feed(0, 1, kPrompt, 5, {1}),
                            b = cut.Feed(0, 1, kPrompt, 5, {1});
  EXPECT_EQ(AllKept(whole, kPrompt + 5), AllKept(cut, kPrompt + 5));
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(Near(a[i], b[i], kSums)) << i;
}

TEST_P(EvictPreset, ASavedStateComesBackWithWhatEachHeadKept) {
  Host host(Evicting(GetParam(), "snapkv:90"));
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 3, {1});
  const int64_t n = kPrompt + 3;
  const auto kept = AllKept(host, n);
  std::vector<std::vector<uint16_t>> keys, values;
  const auto save = [&] {
    keys.clear();
    values.clear();
    for (int l = 0; l < host.n_layers(); ++l) {
      keys.push_back(host.Read(kKeys, l, 0, n));
      values.push_back(host.Read(kValues, l, 0, n));
    }
  };
  save();
  const auto before = std::pair(keys, values);
  sparkv_cache_release(host.cache, 0, 512);
  EXPECT_EQ(host.Memory().tokens, 0);
  for (int l = 0; l < host.n_layers(); ++l) host.Restore(kKeys, l, 0, keys[size_t(l)]);
  for (int l = 0; l < host.n_layers(); ++l) host.Restore(kValues, l, 0, values[size_t(l)]);
  EXPECT_EQ(AllKept(host, n), kept);  // saved again before anything is decoded
  const std::vector<Answer> answers = host.Feed(0, 1, int(n), 2, {1});
  EXPECT_GT(host.Memory().evicted, 200);
  save();
  for (const bool of_keys : {true, false}) {
    for (size_t l = 0; l < keys.size(); ++l) {
      const std::vector<uint16_t>& now = of_keys ? keys[l] : values[l];
      const std::vector<uint16_t>& then = of_keys ? before.first[l] : before.second[l];
      // Rows that were packed when it was saved.
      EXPECT_EQ(std::memcmp(now.data(), then.data(), now.size() / size_t(n) * 2 * 260), 0);
    }
  }
  Host usual(Evicting(GetParam(), "snapkv:90"));
  usual.Feed(0, 1, 0, kPrompt, {128});
  usual.Feed(0, 1, kPrompt, 3, {1});
  const std::vector<Answer> expected = usual.Feed(0, 1, int(n), 2, {1});
  for (size_t i = 0; i < answers.size(); ++i)
    EXPECT_TRUE(Near(answers[i], expected[i], kSums)) << i;
}

TEST_P(EvictPreset, ACopyOfAStreamKeepsTheSameRows) {
  Model model = Evicting(GetParam(), "snapkv:90");
  model.split = true;
  model.streams = 2;
  Host host(model);
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 1, {1});
  for (int l = 0; l < host.n_layers(); ++l) {
    ASSERT_EQ(sparkv_cache_copy_keys(host.cache, l, 0, 1, &host.error), SPARKV_OK);
    ASSERT_EQ(sparkv_cache_copy_values(host.cache, l, 0, 1, &host.error), SPARKV_OK);
  }
  const std::vector<Placed> tokens = host.sequence(0);
  for (const Placed& token : tokens) host.Adopt(1, {token.cell + 512, token.content});
  const Answer a = host.Decode({{0, Content(1, kPrompt + 1)}}).front();
  const Answer b = host.Decode({{1, Content(1, kPrompt + 1)}}).front();
  EXPECT_TRUE(Near(a, b, 0.0));
  EXPECT_EQ(host.Memory().evicted, 2 * 256);
}

// Cells are used again by other sequences: nothing of what was kept for them may show.
TEST_P(EvictPreset, CellsThatAreUsedAgainForgetWhatWasKept) {
  Host host(Evicting(GetParam(), "keydiff:90"));
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 1, {1});
  ASSERT_GT(host.Memory().evicted, 200);
  host.Forget(0, 0, host.sequence(0).size());
  Host fresh(Evicting(GetParam(), "keydiff:90"));
  for (Host* h : {&host, &fresh}) h->Feed(1, 2, 0, 150, {50});
  const std::vector<Answer> a = host.Feed(1, 2, 150, 30, {1}), b = fresh.Feed(1, 2, 150, 30, {1});
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(Near(a[i], b[i], kSums)) << i;
  sparkv_cache_clear(host.cache);
  EXPECT_EQ(host.Memory().tokens, 0);
  EXPECT_EQ(host.Memory().evicted, 0);
}

// The newest of them was read by one query, the first by all: sums would not do them justice.
TEST(Evict, TokensWhoseQueriesChooseStayThemselves) {
  Model model = Evicting("exact", "snapkv:60");
  model.set[1].second = "8";
  Host host(model);
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 1, {1});
  for (const auto& kept : AllKept(host, kPrompt + 1)) {
    for (int i = kPrompt - kObserve + 1; i <= kPrompt; ++i) EXPECT_EQ(kept.count(i), 1u) << i;
  }
}

TEST(Evict, AnotherSequenceOfTheStreamKeepsItsRows) {
  Model model = Evicting("exact", "snapkv:90");
  model.cells = 1024;
  Host host(model);
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 1, {1});
  const std::vector<std::set<int64_t>> kept = AllKept(host, kPrompt + 1);
  host.Feed(1, 2, 0, kPrompt, {128});
  host.Feed(1, 2, kPrompt, 1, {1});
  EXPECT_EQ(AllKept(host, kPrompt + 1), kept);
  EXPECT_EQ(host.Memory().evicted, 2 * 256);
  std::vector<std::set<int64_t>> sees = kept;
  for (auto& list : sees) list.insert(kPrompt + 1);
  const Answer answer = host.Decode({{0, Content(1, kPrompt + 1)}}).front();
  EXPECT_TRUE(Near(answer, Over(host, sees, Content(1, kPrompt + 1)), kSums));
}

TEST(Evict, AStepThatStopsBetweenLayersEvictsNothing) {
  Host host(Evicting("exact", "snapkv:90"));
  host.Feed(0, 1, 0, kPrompt, {128});
  const Step step = host.Begin({{0, Content(1, kPrompt)}});
  std::vector<float> out;
  ASSERT_EQ(host.Write(step, 0, kKeys), SPARKV_OK);
  ASSERT_EQ(host.Write(step, 0, kValues), SPARKV_OK);
  ASSERT_EQ(host.Attend(step, 0, &out), SPARKV_OK);
  for (const auto& kept : AllKept(host, kPrompt)) EXPECT_EQ(kept.size(), size_t(kPrompt));
  EXPECT_EQ(host.Memory().evicted, 0);
}

TEST(Evict, KeysThatMoveAreMovedWhereTheyWereKept) {
  Host host(Evicting("exact", "snapkv:90"));
  host.Feed(0, 1, 0, kPrompt, {128});
  host.Feed(0, 1, kPrompt, 1, {1});
  const auto kept = AllKept(host, kPrompt + 1);
  sparkv_rope rope{};
  rope.struct_size = sizeof(rope);
  rope.n_rot = 32;
  rope.neox = 1;
  rope.n_ctx_orig = 2048;
  rope.freq_base = 10000.0f;
  rope.freq_scale = rope.attn_factor = 1.0f;
  rope.beta_fast = 32.0f;
  rope.beta_slow = 1.0f;
  const std::vector<uint16_t> before = host.Read(kKeys, 0, 0, kPrompt + 1);
  std::vector<int32_t> delta(kPrompt + 1, 64);
  ASSERT_EQ(sparkv_cache_rotate_keys(host.cache, 0, delta.data(), kPrompt + 1, &rope, &host.error),
            SPARKV_OK);
  EXPECT_NE(host.Read(kKeys, 0, 0, kPrompt + 1), before);
  EXPECT_EQ(AllKept(host, kPrompt + 1), kept);
  delta.assign(kPrompt + 1, -64);
  ASSERT_EQ(sparkv_cache_rotate_keys(host.cache, 0, delta.data(), kPrompt + 1, &rope, &host.error),
            SPARKV_OK);
  const std::vector<uint16_t> after = host.Read(kKeys, 0, 0, kPrompt + 1);
  for (size_t i = 0; i < before.size(); ++i)
    ASSERT_NEAR(HalfToFloat(before[i]), HalfToFloat(after[i]), 0.02) << i;
}

}  // namespace
}  // namespace sparkv::test

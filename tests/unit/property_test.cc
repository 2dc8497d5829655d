// Random operations of a host on a cache against a map of what each sequence holds. Failing
// sequences of operations are shrunk.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cstdlib>
#include <cstring>

#include "cache_model.h"

namespace sparkv::test {
namespace {

// The same operations on every run; RC_PARAMS="seed=... max_success=..." tries others.
const int kSeeded = setenv("RC_PARAMS", "seed=20261122 max_success=80", 0);

using Operation = std::tuple<uint8_t, uint16_t, uint16_t,
                             uint16_t>;  // which, and three numbers that it reads as it likes
using Operations = std::vector<Operation>;

class World {
 public:
  World(const Model& model, int n_sequences) : host(model, 7), n_sequences_(n_sequences) {}

  void Do(const Operation& operation) {
    const auto& [which, a, b, c] = operation;
    const int s = a % n_sequences_, t = b % n_sequences_;
    switch (which % 12) {
      case 0:
        Roll(s, c);
        break;
      case 1:
        End(s, c % 2 == 0);
        break;
      case 2:
        host.model.split ? Copy(s, t) : Share(s, t, c);
        break;
      case 3:
        Move(s, 1 + c % 9);
        break;
      case 4:
        c % 8 == 0 ? Clear() : Cut(s, b, c);
        break;
      case 5:
        Store(s, 1 + b % 3);
        break;
      default:
        Decode(s, b, 1 + c % 7);
        break;
    }
    const sparkv_memory m = host.Memory();
    RC_ASSERT(m.slack <= m.resident && m.resident <= m.peak);
  }

  Host host;

 private:
  void MakeRoom(int stream, int64_t n) {
    while (host.n_free(stream) < n) {
      int longest = 0;
      for (int s = 0; s < n_sequences_; ++s) {
        if (host.model.split && s != stream) continue;
        if (host.sequence(s).size() >= host.sequence(longest).size() ||
            (host.model.split && longest != stream))
          longest = s;
      }
      host.Forget(longest, 0, host.sequence(longest).size());
    }
  }

  Batch Tokens(int first, int mix, int n) {
    Batch batch;
    if (host.model.split) {
      const int last = std::min(n_sequences_ - 1, first + mix % 3);
      for (int s = first; s <= last; ++s) {
        MakeRoom(s, n);
        for (int i = 0; i < n; ++i) batch.emplace_back(s, next_++);
      }
    } else {
      MakeRoom(0, n);
      for (int i = 0; i < n; ++i)
        batch.emplace_back(i * mix % 3 == 0 ? first : (first + i * mix) % n_sequences_, next_++);
    }
    return batch;
  }

  void Decode(int first, int mix, int n) {
    const Step step = host.Begin(Tokens(first, mix, n));
    const std::vector<Answer> answers = host.Run(step);
    for (size_t t = 0; t < answers.size(); ++t) {
      const testing::AssertionResult near = Near(answers[t], host.Expected(step.sees[t]), kSums);
      if (!near) RC_FAIL(std::string("token ") + std::to_string(t) + ": " + near.message());
    }
  }

  // Rows without a question.
  void Store(int s, int n) {
    const Step step = host.Begin(Tokens(s, 0, n));
    for (int l = 0; l < host.n_layers(); ++l) {
      RC_ASSERT(host.Write(step, l, kKeys) == SPARKV_OK);
      RC_ASSERT(host.Write(step, l, kValues) == SPARKV_OK);
    }
  }

  void Roll(int s, size_t n) {
    const size_t size = host.sequence(s).size();
    host.Forget(s, size - std::min(size, n % 8), size);
  }

  void Cut(int s, size_t from, size_t n) {
    const size_t size = host.sequence(s).size();
    if (size == 0) return;
    host.Forget(s, from % size, std::min(size, from % size + n % 5));
  }

  void End(int s, bool tell) {
    std::vector<Placed> tokens = host.sequence(s);
    host.Forget(s, 0, tokens.size());
    for (const Placed& token : tokens) {
      if (tell && !host.in_use(token.cell)) sparkv_cache_release(host.cache, token.cell, 1);
    }
  }

  void Clear() {
    for (int s = 0; s < n_sequences_; ++s) host.Forget(s, 0, host.sequence(s).size());
    sparkv_cache_clear(host.cache);
    RC_ASSERT(host.Memory().tokens == 0);
  }

  // Two sequences with one beginning, in the same cells.
  void Share(int from, int to, size_t n) {
    if (from == to) return;
    host.Forget(to, 0, host.sequence(to).size());
    const std::vector<Placed> tokens = host.sequence(from);
    for (size_t i = 0; i < std::min(tokens.size(), n % 40); ++i) host.Adopt(to, tokens[i]);
  }

  void Copy(int from, int to) {
    if (from == to) return;
    for (int l = 0; l < host.n_layers(); ++l)
      RC_ASSERT(sparkv_cache_copy_keys(host.cache, l, from, to, nullptr) == SPARKV_OK);
    for (int l = 0; l < host.n_layers(); ++l)
      RC_ASSERT(sparkv_cache_copy_values(host.cache, l, from, to, nullptr) == SPARKV_OK);
    host.Forget(to, 0, host.sequence(to).size());
    for (const Placed& token : std::vector<Placed>(host.sequence(from))) {
      host.Adopt(to, {token.cell + (to - from) * host.model.cells, token.content});
    }
  }

  // The newest tokens are saved and come back in other cells.
  void Move(int s, size_t n) {
    const std::vector<Placed> tokens = host.sequence(s);
    const int stream = host.model.split ? s : 0;
    n = std::min({n, tokens.size(), size_t(host.n_free(stream))});
    host.Forget(s, tokens.size() - n, tokens.size());
    std::vector<std::vector<uint16_t>> rows;
    for (size_t i = tokens.size() - n; i < tokens.size(); ++i) {
      rows.push_back(host.Rows(tokens[i].cell));
      RC_ASSERT(rows.back() == host.RawRows(tokens[i].content));
    }
    for (size_t i = 0; i < n; ++i) {
      int64_t cell = stream * host.model.cells;
      while (host.in_use(cell)) ++cell;
      size_t at = 0;
      for (const Kind kind : {kKeys, kValues}) {
        for (int l = 0; l < host.n_layers(); ++l) {
          const size_t row = kind == kKeys ? host.layer(l).k_row() : host.layer(l).v_row();
          host.Restore(
              kind, l, cell,
              std::vector<uint16_t>(rows[i].begin() + long(at), rows[i].begin() + long(at + row)));
          at += row;
        }
      }
      host.Adopt(s, {cell, tokens[tokens.size() - n + i].content});
    }
  }

  const int n_sequences_;
  uint64_t next_ = 1;
};

Model Small() {
  Model model;
  model.set = {{"window", "4"}, {"sinks", "1"}};
  model.layers = {{1, 32, 40, 2}, {2, 40, 32, 1}};
  return model;
}

TEST(Property, SixtyFourSequencesInOneStreamSeeExactlyTheirOwnTokens) {
  EXPECT_TRUE(rc::check([](const Operations& operations) {
    Model model = Small();
    model.cells = 200;
    model.scatter = true;
    World world(model, 64);
    for (const Operation& operation : operations) world.Do(operation);
  }));
}

TEST(Property, FewSequencesThatGrowLongSeeExactlyTheirOwnTokens) {
  EXPECT_TRUE(rc::check([](const Operations& operations) {
    Model model = Small();
    model.cells = 150;
    World world(model, 3);
    for (const Operation& operation : operations) world.Do(operation);
  }));
}

TEST(Property, StreamsSeeExactlyTheirOwnTokens) {
  EXPECT_TRUE(rc::check([](const Operations& operations) {
    Model model = Small();
    model.cells = 70;
    model.streams = 5;
    model.split = true;
    World world(model, 5);
    for (const Operation& operation : operations) world.Do(operation);
  }));
}

// With a lossy preset nothing is known about the numbers but that they are some, and that memory
// adds up.
TEST(Property, LossyCachesStayFiniteAndCountEveryByte) {
  EXPECT_TRUE(rc::check([](const Operations& operations) {
    Model model = Small();
    model.preset = "spark-0.5-i5";
    model.set.emplace_back("observe", "6");
    model.cells = 120;
    Host host(model);
    uint64_t next = 1;
    for (const auto& [which, a, b, c] : operations) {
      const int s = a % 4;
      if (host.n_free(0) < 8 || which % 9 == 0) host.Forget(s, 0, host.sequence(s).size());
      if (host.n_free(0) < 8) continue;
      if (which % 9 == 1) sparkv_cache_clear(host.cache);  // rows that are gone read as nothing
      Batch batch;
      for (int i = 0; i <= c % 7; ++i) batch.emplace_back((s + i * b) % 4, next++);
      for (const Answer& answer : host.Decode(batch)) {
        for (const float x : answer) RC_ASSERT(std::isfinite(x));
      }
      const sparkv_memory m = host.Memory();
      RC_ASSERT(m.key_masks + m.key_signs + m.key_scales + m.key_kept + m.value_scales +
                    m.value_codes + m.dense_keys + m.dense_values + m.tables + m.cells + m.slack +
                    m.workspace ==
                m.resident);
      RC_ASSERT(m.sealed <= m.tokens && m.tokens <= model.cells);
      for (int64_t cell = 0; cell < model.cells; cell += 17) host.Rows(cell);
    }
  }));
}

}  // namespace
}  // namespace sparkv::test

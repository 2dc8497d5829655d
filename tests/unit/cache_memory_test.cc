// What a cache says it takes, and what it takes.
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstring>

#include "cache/dense_store.h"
#include "cache_model.h"

namespace sparkv::test {
namespace {

uint64_t SumOfKinds(const sparkv_memory& m) {
  return m.key_masks + m.key_signs + m.key_scales + m.key_kept + m.value_scales + m.value_codes +
         m.dense_keys + m.dense_values + m.tables + m.cells + m.slack + m.workspace;
}

TEST(Cache, KindsOfMemorySumUpAndThePeakNeverFalls) {
  for (const char* recent : {"", "20:i8+q8,30:i6+q4"}) {
    Model model;
    model.preset = "spark-0.5-i5";
    model.set = {{"window", "16"}, {"recent", recent}};
    model.scatter = true;
    Host host(model);
    std::mt19937 rng(3);
    std::map<int, int> next;
    uint64_t peak = 0;
    for (int step = 0; step < 60; ++step) {
      if (host.n_free(0) < 20) {
        const int gone = int(rng() % 4);
        for (const Placed& token : host.sequence(gone))
          sparkv_cache_release(host.cache, token.cell, 1);
        host.Forget(gone, 0, host.sequence(gone).size());
      }
      host.Decode(Mixed(rng, &next, 4, 9));
      const sparkv_memory m = host.Memory();
      ASSERT_EQ(SumOfKinds(m), m.resident);
      ASSERT_GE(m.peak, m.resident);
      ASSERT_GE(m.peak, peak);
      ASSERT_LE(m.slack, m.resident);
      peak = m.peak;
      int64_t live = 0;
      for (int64_t c = 0; c < model.cells; ++c) live += host.in_use(c) ? 1 : 0;
      ASSERT_EQ(m.tokens, live);
      uint64_t row = 0;
      for (const Layer& layer : model.layers) row += 2 * (layer.k_row() + layer.v_row());
      ASSERT_EQ(m.f16_bytes, uint64_t(live) * row);
    }
    sparkv_cache_clear(host.cache);
    const sparkv_memory m = host.Memory();
    EXPECT_EQ(m.tokens, 0);
    EXPECT_EQ(m.resident - m.workspace - m.tables, m.cells);
    EXPECT_LT(m.cells, 4096u);  // one bit per cell and no page
    EXPECT_EQ(m.slack, 0u);
    EXPECT_EQ(m.peak, peak);
    sparkv_memory high{};
    high.struct_size = sizeof(high);
    sparkv_cache_high_water(host.cache, &high);
    EXPECT_GT(high.tokens, 200);
    EXPECT_EQ(SumOfKinds(high), high.resident);
  }
}

TEST(Cache, BytesOfTheStagesAreCountedAsWritten) {
  Model model;
  model.preset = "tiers-5321";
  model.layers = {{2, 64, 64, 3}};
  model.set = {{"window", "16"}, {"recent", "40:i8+q8,100:t7432+t4"}};
  model.cells = 512;
  for (const std::vector<int>& cuts : {std::vector<int>{300}, {1}, {37}}) {
    Host host(model);
    host.Feed(0, 1, 0, 300, cuts);
    const sparkv_memory m = host.Memory();
    // Heads of 64 channels: f16 128 bytes; i8 and q8 two of scale; t7432 three of gains and 4 bits,
    // t4 one of gain and 4 bits.
    const uint64_t window = 4 + 16, first = 40 - 16, second = 100 - 40;
    EXPECT_EQ(m.sealed, 300 - int64_t(window + first + second));
    EXPECT_EQ(m.dense_keys, 2 * (window * 128 + first * 66 + second * 35));
    EXPECT_EQ(m.dense_values, 2 * (window * 128 + first * 66 + second * 33));
    EXPECT_EQ(SumOfKinds(m), m.resident);
  }
}

// A layer whose packed rows take more bytes than a stage keeps them as they are packed.
TEST(Cache, RowsOfAStageNeverTakeFewerBytesThanPackedOnes) {
  Model model;
  model.preset = "tiers-7543";
  model.layers = {{1, 64, 64, 2}};
  model.set = {{"window", "16"}, {"recent", "40:t7432+q8"}};
  Host host(model), plain(model);
  host.Feed(0, 1, 0, 100, {100});
  const sparkv_memory m = host.Memory();
  const uint64_t packed_key = m.key_scales + m.key_kept;
  EXPECT_EQ((m.dense_keys - 20 * 128) * uint64_t(m.sealed), 24 * packed_key);
  EXPECT_EQ(m.dense_values - 20 * 128, 24 * 66u);
}

TEST(Cache, ThePeakIsRememberedWhenAStepIsCleared) {
  Host host(Model{});
  const Step step = host.Begin({{0, Content(0, 0)}});
  ASSERT_EQ(host.Write(step, 0, kKeys), SPARKV_OK);
  const uint64_t peak = host.Memory().peak;
  sparkv_cache_clear(host.cache);
  EXPECT_GE(host.Memory().peak, peak);
}

TEST(Cache, OverwritingCellsDoesNotGrowAndShrinkingNKvReleases) {
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "16"}};
  model.cells = 1024;
  Host host(model);
  host.Feed(0, 1, 0, 1000, {250});
  const sparkv_memory full = host.Memory();
  for (int round = 0; round < 5; ++round) {
    host.Forget(0, 0, host.sequence(0).size());
    host.Feed(0, 2 + round, 0, 1000, {250});
    const sparkv_memory m = host.Memory();
    ASSERT_EQ(m.tokens, 1000);
    ASSERT_EQ(m.sealed, full.sealed);
    ASSERT_LE(m.resident, full.resident + 16 * m.tables / (uint64_t(round) + 2) + 8 * 4096)
        << round;
  }
  host.Forget(0, 100, 1000);
  host.Feed(0, 9, 100, 1, {1});
  const sparkv_memory m = host.Memory();
  EXPECT_LE(m.tokens, 128);  // n_kv is a multiple of 32
  EXPECT_LT(m.resident - m.workspace - m.tables,
            (full.resident - full.workspace - full.tables) / 3);
}

// Kilobytes of private memory this process holds.
int64_t ResidentKb() {
  std::FILE* file = std::fopen("/proc/self/smaps_rollup", "r");
  if (file == nullptr) return -1;
  char line[256];
  int64_t kb = -1;
  while (std::fgets(line, sizeof(line), file) != nullptr) std::sscanf(line, "Anonymous: %ld", &kb);
  std::fclose(file);
  return kb;
}

TEST(Cache, CommittedBytesAreWhatTheKernelHolds) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer's own memory is in the way";
#endif
  if (ResidentKb() < 0) GTEST_SKIP() << "no smaps_rollup";
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "32"}};
  model.layers = std::vector<Layer>(2, Layer{8, 128, 128, 1});
  model.cells = 32768;
  Host host(model);
  int position = 0;
  const auto feed_until = [&](int end) {
    while (position < end) {
      Batch batch;
      for (int i = 0; i < 64; ++i) batch.emplace_back(0, Content(1, position++));
      host.Decode(batch);
    }
    malloc_trim(0);
  };
  feed_until(64);  // scratch is in use before the count starts
  const sparkv_memory start = host.Memory();
  const int64_t before = ResidentKb();
  feed_until(3200);
  const sparkv_memory end = host.Memory();
  const double held = double(ResidentKb() - before) * 1024,
               said = double(end.resident) - double(start.resident);
  EXPECT_GT(said, 6e6);
  EXPECT_NEAR(held / said, 1.0, 0.05) << held << " held, " << said << " said";

  const int64_t full = ResidentKb();
  sparkv_cache_clear(host.cache);
  malloc_trim(0);
  const double given = double(full - ResidentKb()) * 1024,
               forgotten = double(end.resident) - double(host.Memory().resident);
  EXPECT_NEAR(given / forgotten, 1.0, 0.05)
      << given << " given back, " << forgotten << " forgotten";
}

TEST(Cache, BitsPerElementAreThoseComputedByHand) {
  Model model;
  model.preset = "spark-0.5-i5";
  model.set = {{"window", "32"}, {"sinks", "4"}};
  model.layers = {{4, 64, 64, 1}, {4, 64, 64, 1}};
  model.cells = 4096;
  Host host(model);
  host.Feed(0, 1, 0, 4096, {512});
  const sparkv_memory m = host.Memory();
  const uint64_t sealed = 4096 - 4 - 32, heads = 8;
  ASSERT_EQ(uint64_t(m.sealed), sealed);
  // Key row of 64 channels: mask 8, signs 4, then scale and codes. Value row: scale 2, 64 codes of
  // 4 bits.
  const uint64_t key_row = sparkv_key_row_bytes(&host.config, 64);
  EXPECT_EQ(m.key_masks, sealed * heads * 8);
  EXPECT_EQ(m.key_signs, sealed * heads * 4);
  EXPECT_EQ(m.key_scales + m.key_kept, sealed * heads * (key_row - 12));
  EXPECT_EQ(m.value_scales, sealed * heads * 2);
  EXPECT_EQ(m.value_codes, sealed * heads * 32);
  EXPECT_EQ(m.dense_keys, 36 * heads * 128);
  EXPECT_EQ(m.dense_values, 36 * heads * 128);
  EXPECT_EQ(m.tables, TableNumbers(host.Weights()) * 2);
  EXPECT_EQ(m.f16_bytes, 4096 * heads * 256);
  const double elements = 4096.0 * heads * 64;
  EXPECT_NEAR(m.bits, 8.0 * double(m.resident - m.workspace) / (2 * elements), 1e-9);
  EXPECT_NEAR(m.key_bits + m.value_bits, 2 * m.bits, 1e-9);
  EXPECT_GT(m.key_bits, double(key_row) * 8 / 64 * 0.99);
  EXPECT_GT(m.value_bits, 34 * 8 / 64.0 * 0.99);
  EXPECT_LT(m.bits, 5.0);
}

TEST(Cache, AMillionCellsCommitNextToNothing) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer's own memory is in the way";
#endif
  if (ResidentKb() < 0) GTEST_SKIP() << "no smaps_rollup";
  const sparkv_config config = MakeConfig(Model{});
  const std::vector<sparkv_layer_shape> layers(32, sparkv_layer_shape{8, 128, 128});
  const sparkv_shape shape{sizeof(shape), 32, layers.data(), int64_t{1} << 20, 1, nullptr, 0};
  sparkv_cache* cache = nullptr;
  sparkv_error error{};
  const long before = ResidentKb();
  ASSERT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_OK) << error.text;
  const long resident = ResidentKb() - before;
  sparkv_memory m{};
  m.struct_size = sizeof(m);
  sparkv_cache_memory(cache, &m);
  EXPECT_LT(m.resident, uint64_t{16} << 20) << "a 128 GiB cache of f16 rows";
  EXPECT_LT(resident, long(m.resident / 1024) + 512) << "not all of it is in the report";
  sparkv_cache_free(cache);
}

TEST(Cache, BalancedTakesAQuarterOfTheBytesOfExactRowsUnderEviction) {
  double bits[2] = {};  // summed over an answer
  for (const int balanced : {0, 1}) {
    Model model;
    model.preset = balanced != 0 ? "balanced" : "exact";
    model.set = {{"evict", "snapkv:512"}};
    model.layers.assign(6, {2, 128, 128, 1});
    model.cells = 1024;
    Host host(model);
    host.Feed(0, 1, 0, 700, {350});
    for (int i = 0; i < 128; ++i) {
      host.Feed(0, 1, 700 + i, 1, {1});
      if (i > 0) bits[balanced] += host.Memory().bits;
    }
    EXPECT_GT(host.Memory().evicted, 500);
  }
  EXPECT_LE(bits[1] / bits[0], 0.25);
}

// Rows of a long micro-batch enter a stage before older ones have left it: what holes they leave
// behind is given back, up to a group of slots in each store.
TEST(Cache, ALongMicroBatchLeavesAsFewSlotsAsShortOnes) {
  uint64_t slots[2];
  for (const int n_tokens : {1, 100}) {
    Model model;
    model.preset = "balanced";
    model.layers.assign(3, {2, 64, 64, 1});
    model.cells = 2048;
    Host host(model);
    host.Feed(0, 1, 0, 1500, {n_tokens});
    const sparkv_memory memory = host.Memory();
    slots[n_tokens > 1] = memory.dense_keys + memory.dense_values + memory.slack;
  }
  // A row of the second stage: keys of 4 bits with four gains, values of 4 bits with one.
  EXPECT_LT(slots[1], slots[0] + 16 * 3 * 2 * (36 + 33));
}

TEST(DenseStore, TrimKeepsNoEmptyGroupButTheNext) {
  DenseStore store;
  ASSERT_TRUE(store.Map(4096, 64, 4).ok());
  constexpr size_t kGroup = size_t(kGroupSlots) * 4096;
  for (int32_t slot = 0; slot < 3 * kGroupSlots; ++slot) ASSERT_EQ(store.Allocate(), slot);
  for (int32_t slot = kGroupSlots; slot < 2 * kGroupSlots; ++slot) store.Free(slot);
  store.Trim(/*keep_next=*/true);
  EXPECT_EQ(store.committed(), 3 * kGroup);
  store.Trim(/*keep_next=*/false);
  EXPECT_EQ(store.committed(), 2 * kGroup);
  EXPECT_EQ(store.Allocate(), kGroupSlots);
  EXPECT_EQ(store.committed(), 3 * kGroup);
}

}  // namespace
}  // namespace sparkv::test

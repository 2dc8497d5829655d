// Packed rows: sizes, exactness, determinism, idempotence, hostile bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "cache/weight_tables.h"
#include "config/config.h"
#include "format/log_grid.h"
#include "format/trellis.h"
#include "hard_rows.h"
#include "ops/hadamard.h"
#include "reference/reference.h"

namespace sparkv::test {
namespace {

KeyLayout LayoutOf(const sparkv_config& config, int head_dim) {
  return KeyLayout::Make(head_dim, KeptChannels(config.ratio, head_dim), sparkv_number(config.kept),
                         sparkv_recover(config.recover));
}

struct Table {
  std::vector<uint16_t> a;
  std::vector<float> table;
  KeyLayout key;  // of rows under it
};

Table TableOf(const KeyLayout& layout, const std::vector<float>& u) {
  Table t;
  t.a.resize(u.size());
  t.table.resize(kWeightParts * u.size() + 16);
  if (layout.tiered()) {
    std::vector<float> energy = u, keys(u.rbegin(), u.rend());
    for (float& x : energy) x *= x;
    MakeTierTable(energy.data(), keys.data(), int(u.size()), t.a.data());
  } else {
    MakeTable(layout.recover, u.data(), int(u.size()), t.a.data());
  }
  ExpandTable(t.a.data(), int(u.size()), t.table.data());
  t.key = layout.Under(t.a.data());
  return t;
}

TEST(Rows, SizesAreThoseOfTheFormatDocument) {
  sparkv_config config = Blank();
  ASSERT_EQ(sparkv_config_preset(&config, "spark-0.5-i5", nullptr), SPARKV_OK);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 64), 2u + 8 + 4 + 16 + 4);
  EXPECT_EQ(sparkv_value_row_bytes(&config, 64), 2u + 32);
  ASSERT_EQ(sparkv_config_preset(&config, "spark-0.8", nullptr), SPARKV_OK);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 64), 1u + 8 + 7 + 26);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 128), 1u + 16 + 13 + 52);
  ASSERT_EQ(sparkv_config_preset(&config, "exact", nullptr), SPARKV_OK);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 80), 160u);
  EXPECT_EQ(sparkv_value_row_bytes(&config, 80), 160u);
  ASSERT_EQ(sparkv_config_preset(&config, "tiers-7432", nullptr), SPARKV_OK);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 64), 3u + 8 + 8 + 6 + 4 + 2 + 2 + 2);
  EXPECT_EQ(sparkv_value_row_bytes(&config, 64), 1u + 32);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 40), 3u + 5 + 5 + 4 + 3 + 2 + 2 + 2);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 63), 0u);
  EXPECT_EQ(sparkv_key_row_bytes(&config, 520), 0u);
}

TEST(Rows, ExactPresetIsBitExactForEveryHalf) {
  sparkv_config config = Blank();
  ASSERT_EQ(sparkv_config_preset(&config, "exact", nullptr), SPARKV_OK);
  std::vector<uint16_t> k(512), back(512);
  std::vector<uint8_t> row(1024);
  for (int first = 0; first < 65536; first += 512) {
    for (int j = 0; j < 512; ++j) k[size_t(j)] = uint16_t(first + j);
    ASSERT_EQ(sparkv_pack_key(&config, nullptr, k.data(), 512, row.data(), 1024, nullptr),
              SPARKV_OK);
    ASSERT_EQ(sparkv_unpack_key(&config, nullptr, row.data(), 1024, 512, back.data(), nullptr),
              SPARKV_OK);
    ASSERT_EQ(k, back);
  }
}

TEST(Rows, EveryInstructionSetWritesTheSameBytesAndPackingIsIdempotent) {
  std::mt19937 rng(7);
  const std::vector<const OpTable*> ops = AllOps();
  for (const int dim : kHeadDims) {
    for (const sparkv_config& config : AllConfigs()) {
      for (int weights = 0; weights < kWeightKinds; ++weights) {
        const Table table = TableOf(LayoutOf(config, dim), HardWeights(dim, weights, rng));
        const KeyLayout& layout = table.key;
        for (int kind = 0; kind < kKinds; ++kind) {
          const std::vector<uint16_t> k = HardRow(dim, kind, rng);
          std::vector<uint8_t> first(layout.bytes + 64, 0xaa), row(layout.bytes + 64, 0xaa);
          PackKey(ops[0], layout, table.table.data(), k.data(), first.data());
          std::vector<uint16_t> back(k.size()), other(k.size());
          ops[0]->unpack_key(layout, table.table.data(), first.data(), back.data());
          for (const OpTable* op : ops) {
            std::fill(row.begin(), row.end(), 0xaa);
            PackKey(op, layout, table.table.data(), k.data(), row.data());
            ASSERT_EQ(row, first) << op->name << " " << Name(config) << " D " << dim << " kind "
                                  << kind << " weights " << weights;
            op->unpack_key(layout, table.table.data(), row.data(), other.data());
            ASSERT_EQ(other, back) << op->name << " " << Name(config);
          }
          PackKey(ops[0], layout, table.table.data(), back.data(), row.data());
          ASSERT_EQ(row, first) << "not idempotent: " << Name(config) << " D " << dim << " kind "
                                << kind << " weights " << weights;
        }
      }
    }
  }
}

TEST(Rows, ValuesAreTheSameBytesEverywhereAndIdempotent) {
  std::mt19937 rng(11);
  const std::vector<const OpTable*> ops = AllOps();
  for (const int dim : kHeadDims) {
    for (const sparkv_number number : {SPARKV_F16, SPARKV_INT8, SPARKV_INT4, SPARKV_TRELLIS4,
                                       SPARKV_TRELLIS3, SPARKV_TRELLIS2, SPARKV_TRELLIS1}) {
      const ValueLayout layout = ValueLayout::Make(dim, number);
      for (int kind = 0; kind < kKinds; ++kind) {
        for (int repeat = 0; repeat < 8; ++repeat) {
          const std::vector<uint16_t> v = HardRow(dim, kind, rng);
          std::vector<uint8_t> first(layout.bytes + 64, 0xaa), row(layout.bytes + 64, 0xaa);
          std::vector<uint16_t> back(v.size()), other(v.size());
          PackValue(ops[0], layout, v.data(), first.data());
          ops[0]->unpack_value(layout, first.data(), back.data());
          for (const OpTable* op : ops) {
            std::fill(row.begin(), row.end(), 0xaa);
            PackValue(op, layout, v.data(), row.data());
            ASSERT_EQ(row, first) << op->name << " D " << dim << " kind " << kind;
            op->unpack_value(layout, row.data(), other.data());
            ASSERT_EQ(other, back) << op->name;
          }
          PackValue(ops[0], layout, back.data(), row.data());
          ASSERT_EQ(row, first) << "not idempotent: D " << dim << " number " << number << " kind "
                                << kind;
        }
      }
    }
  }
}

// Rows beside each other do not touch: each is packed as if it were alone, whatever their number,
// their weights and what the others are.
TEST(Rows, ManyTogetherAreTheBytesOfEachAlone) {
  std::mt19937 rng(31);
  constexpr int kMost = 37;
  for (const OpTable* ops : AllOps()) {
    for (const int dim : {32, 40, 64, 128, 136, 512}) {
      for (const sparkv_config& config : AllConfigs()) {
        const ValueLayout value = ValueLayout::Make(dim, sparkv_number(config.values));
        std::vector<Table> weights;
        for (int i = 0; i < 3; ++i)
          weights.push_back(TableOf(LayoutOf(config, dim), HardWeights(dim, i, rng)));
        const KeyLayout& key = weights[0].key;  // what rows beside each other share
        for (const int n : {1, 3, kMost}) {
          std::vector<std::vector<uint16_t>> numbers;
          std::vector<std::vector<uint8_t>> keys(size_t(n),
                                                 std::vector<uint8_t>(key.bytes + 1, 0xaa));
          std::vector<std::vector<uint8_t>> values(size_t(n),
                                                   std::vector<uint8_t>(value.bytes + 1, 0xaa));
          std::vector<const float*> tables;
          std::vector<const uint16_t*> from;
          std::vector<uint8_t*> to_key, to_value;
          for (int i = 0; i < n; ++i) numbers.push_back(HardRow(dim, int(rng() % kKinds), rng));
          for (size_t i = 0; i < size_t(n); ++i) {
            tables.push_back(weights[i / 2 % 3].table.data());
            from.push_back(numbers[i].data());
            to_key.push_back(keys[i].data());
            to_value.push_back(values[i].data());
          }
          ops->pack_keys(key, n, tables.data(), from.data(), to_key.data());
          ops->pack_values(value, n, from.data(), to_value.data());
          for (size_t i = 0; i < size_t(n); ++i) {
            std::vector<uint8_t> alone(key.bytes + 1, 0xaa);
            PackKey(ops, key, tables[i], from[i], alone.data());
            ASSERT_EQ(keys[i], alone) << ops->name << " " << Name(config) << " D " << dim;
            alone.assign(value.bytes + 1, 0xaa);
            PackValue(ops, value, from[i], alone.data());
            ASSERT_EQ(values[i], alone) << ops->name << " " << Name(config) << " D " << dim;
          }
        }
      }
    }
  }
}

// Marks of tiers whose energies fall by these steps of 3/4 dB.
KeyLayout Falling(sparkv_number number, int dim, std::array<int, 3> fall) {
  std::vector<uint16_t> weights(size_t(dim), 0x3c00u);
  for (int t = 0; t < 3; ++t) SetTierFall(t, fall[size_t(t)], weights.data());
  for (int t = 0; t < 3; ++t) EXPECT_EQ(TierFall(weights.data(), t), fall[size_t(t)]);
  return KeyLayout::Make(dim, dim, number, SPARKV_RECOVER_ZERO).Under(weights.data());
}
std::string BitsOf(const KeyLayout& key) {
  std::string text;
  for (const int bits : key.tier_bits) text += std::to_string(bits);
  return text;
}

TEST(Tiers, BitsFollowTheEnergies) {
  // 6 dB are about a bit. The first tier alone may have more than five.
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_6321, 64, {0, 0, 0})), "3333");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_6321, 64, {8, 8, 8})), "5421");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_6321, 64, {16, 8, 8})), "6321");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_6321, 64, {31, 0, 31})), "7320");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_6321, 64, {31, 31, 31})), "7500");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_7543, 64, {0, 31, 31})), "7552");
  EXPECT_EQ(BitsOf(Falling(SPARKV_TIERS_4210, 64, {31, 31, 31})), "6100");
}

// However a head shares them: the same bytes, as many bits, none of them rising.
TEST(Tiers, RowsTakeTheSameBytesUnderAllWeights) {
  std::mt19937 rng(17);
  for (const int dim : kHeadDims) {
    for (const sparkv_config& config : TierConfigs()) {
      const KeyLayout named = LayoutOf(config, dim);
      std::set<std::string> seen;
      for (int i = 0; i < 500; ++i) {
        const KeyLayout key =
            Falling(named.number, dim, {int(rng() % 32), int(rng() % 32), int(rng() % 32)});
        int sum = 0, want = 0;
        for (int t = 0; t < kTiers; ++t) {
          sum += key.tier_bits[t];
          want += named.tier_bits[t];
          ASSERT_LE(key.tier_bits[t], t == 0 ? 7 : std::min(5, key.tier_bits[t - 1]));
        }
        ASSERT_EQ(sum, want);
        ASSERT_EQ(key.bytes, named.bytes);
        ASSERT_LE(key.planes.end, named.bytes);
        if (dim % 32 == 0) {
          ASSERT_EQ(key.planes.end, named.bytes);
        }
        seen.insert(BitsOf(key));
      }
      EXPECT_GT(seen.size(), 1u) << Name(config) << " D " << dim;
    }
  }
}

// Rows that come from whole numbers alone, so that every machine packs the same ones: a file or a
// test of another machine gives this number, too.
uint64_t HashOfRows(const std::vector<sparkv_config>& configs) {
  std::mt19937 rng(23);
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  uint8_t bytes[2 * kMaxHeadDim + 64];
  const auto add = [&](size_t n) {
    for (size_t i = 0; i < n; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  };
  for (const int dim : kHeadDims) {
    std::vector<uint16_t> row(static_cast<size_t>(dim));
    std::vector<float> u(row.size());
    for (const sparkv_config& config : configs) {
      for (float& x : u) x = float(1 + rng() % 1000);
      for (uint16_t& half : row) half = uint16_t((rng() & 0x83ff) | (8 + rng() % 16) << 10);
      const Table table = TableOf(LayoutOf(config, dim), u);
      const ValueLayout value = ValueLayout::Make(dim, sparkv_number(config.values));
      PackKey(AllOps().back(), table.key, table.table.data(), row.data(), bytes);
      add(table.key.bytes);
      PackValue(AllOps().back(), value, row.data(), bytes);
      add(value.bytes);
    }
  }
  return hash;
}
TEST(Rows, BytesAreTheSameOnEveryMachine) {
  EXPECT_EQ(HashOfRows(SparkConfigs()), 15486821904406340446u);
  EXPECT_EQ(HashOfRows(TierConfigs()), 3006472354864963798u);
}

// Brackets on both sides: an "improvement" is noticed too. Relative error of the weighted key, mean
// over 400 rows.
TEST(Rows, ErrorsLieWhereTheFormatPutsThem) {
  std::mt19937 rng(3);
  struct Case {
    const char* preset;
    double low, high;
  };
  for (const Case c : {Case{"spark-0.5", 2e-4, 1e-3}, Case{"spark-0.5-i8", 4e-4, 2e-3},
                       Case{"spark-0.5-i5", .005, .03}, Case{"spark-0.5-i4", .02, .12},
                       Case{"spark-0.8", 2e-3, 1e-2}, Case{"spark-0-i8", 5e-5, 7e-4},
                       Case{"tiers-7543", 1e-4, 1.5e-3}, Case{"tiers-7432", 3e-4, 4e-3},
                       Case{"tiers-6321", 1e-3, 2e-2}, Case{"tiers-5321", 2e-3, 3e-2},
                       Case{"tiers-4210", 4e-3, 8e-2}}) {
    sparkv_config config = Blank();
    ASSERT_EQ(sparkv_config_preset(&config, c.preset, nullptr), SPARKV_OK) << c.preset;
    double error = 0.0, energy = 0.0;
    for (int i = 0; i < 400; ++i) {
      const Table table = TableOf(LayoutOf(config, 64), HardWeights(64, 0, rng));
      const KeyLayout& layout = table.key;
      const std::vector<uint16_t> k = HardRow(64, 0, rng);
      std::vector<uint8_t> row(layout.bytes);
      std::vector<uint16_t> back(64);
      PackKey(CpuOps(SPARKV_SIMD_AUTO), layout, table.table.data(), k.data(), row.data());
      CpuOps(SPARKV_SIMD_AUTO)->unpack_key(layout, table.table.data(), row.data(), back.data());
      for (size_t j = 0; j < 64; ++j) {
        const double w = KeyWeights(table.table.data(), 64).weight[j], x = HalfToFloat(k[j]) * w,
                     y = HalfToFloat(back[j]) * w;
        error += (x - y) * (x - y);
        energy += x * x;
      }
    }
    EXPECT_GT(error / energy, c.low) << c.preset;
    EXPECT_LT(error / energy, c.high) << c.preset;
  }
}

TEST(Trellis, RowsAreWhatTheReferenceReads) {
  std::mt19937 rng(41);
  for (const int dim : kHeadDims) {
    for (const sparkv_config& config : TierConfigs()) {
      for (const int kind : {0, 1, 2, 3, 6, 8}) {
        const ValueLayout value = ValueLayout::Make(dim, sparkv_number(config.values));
        const Table table = TableOf(LayoutOf(config, dim), HardWeights(dim, 0, rng));
        const KeyLayout& key = table.key;
        const std::vector<uint16_t> in = HardRow(dim, kind, rng);
        std::vector<uint8_t> row(std::max(key.bytes, value.bytes));
        std::vector<uint16_t> out(in.size());
        const OpTable* ops = CpuOps(SPARKV_SIMD_AUTO);
        const auto equals = [&](const reference::Row& want, double size) {
          for (size_t j = 0; j < out.size(); ++j) {
            const double x = HalfToFloat(out[j]);
            if (std::isnan(want[j]) ? !std::isnan(x)
                                    : !(std::fabs(x - want[j]) < 1e-3 * std::fabs(want[j]) + size))
              return false;
          }
          return true;
        };
        PackKey(ops, key, table.table.data(), in.data(), row.data());
        ops->unpack_key(key, table.table.data(), row.data(), out.data());
        ASSERT_TRUE(
            equals(reference::UnpackTiers(row.data(), table.a.data(), dim, key.tier_bits), 1e-4))
            << Name(config) << " D " << dim << " kind " << kind;
        PackValue(ops, value, in.data(), row.data());
        ops->unpack_value(value, row.data(), out.data());
        const int value_bits = TrellisBits(value.number);
        ASSERT_TRUE(equals(reference::UnpackTrellisValue(row.data(), dim, value_bits), 1e-4))
            << Name(config) << " D " << dim << " kind " << kind;
      }
    }
  }
}

// The path is the best one for the lifted row under its gain, but for one step of the gain that
// gives the row its length back: with that the best path may be another, and no gain in reach is
// much better.
TEST(Trellis, NoPathIsMuchBetter) {
  std::mt19937 rng(43);
  std::normal_distribution<float> normal;
  for (const sparkv_number number :
       {SPARKV_TRELLIS4, SPARKV_TRELLIS3, SPARKV_TRELLIS2, SPARKV_TRELLIS1}) {
    const ValueLayout layout = ValueLayout::Make(64, number);
    const int bits = TrellisBits(number);
    double loss = 0.0, best = 0.0, energy = 0.0;
    for (int i = 0; i < 100; ++i) {
      std::vector<uint16_t> v(64), back(64);
      for (uint16_t& half : v) half = FloatToHalf(normal(rng));
      std::vector<uint8_t> row(layout.bytes);
      PackValue(CpuOps(SPARKV_SIMD_AUTO), layout, v.data(), row.data());
      CpuOps(SPARKV_SIMD_AUTO)->unpack_value(layout, row.data(), back.data());
      std::vector<float> x(64);
      for (size_t j = 0; j < 64; ++j) {
        x[j] = HalfToFloat(v[j]) * kTrellisLevels[bits].lift;
        const double off = double(x[j]) - HalfToFloat(back[j]);
        loss += off * off;
        energy += double(x[j]) * x[j];
      }
      Rotate(x.data(), 64, 64);
      double least = 1e30;
      for (int e = row[0] - 3; e <= row[0] + 3; ++e) {
        least = std::min(least, reference::TrellisLoss({x.begin(), x.end()},
                                                       reference::Row(64, ValueGainGrid::Value(e)),
                                                       std::vector<int>(64, bits)));
      }
      best += least;
    }
    EXPECT_LT(loss, 1.25 * best) << bits << " bits";
    // Lloyd-Max levels without a trellis reach 9.3, 14.6 and 20.2 dB.
    EXPECT_LT(loss / energy, std::pow(10.0, -(bits == 1   ? 0.42
                                              : bits == 2 ? 0.98
                                              : bits == 3 ? 1.53
                                                          : 2.08)));
  }
}

// What all values lose would stay in their mean, which is what attention takes.
TEST(Trellis, ValuesKeepTheirSizeInTheMean) {
  std::mt19937 rng(44);
  std::normal_distribution<float> normal;
  for (const sparkv_number number :
       {SPARKV_TRELLIS4, SPARKV_TRELLIS3, SPARKV_TRELLIS2, SPARKV_TRELLIS1}) {
    for (const int dim : {64, 80, 128}) {
      const ValueLayout layout = ValueLayout::Make(dim, number);
      double product = 0.0, energy = 0.0;
      for (int i = 0; i < 1000; ++i) {
        std::vector<uint16_t> v(static_cast<size_t>(dim)), back(v.size());
        for (uint16_t& half : v) half = FloatToHalf(normal(rng));
        std::vector<uint8_t> row(layout.bytes);
        PackValue(CpuOps(SPARKV_SIMD_AUTO), layout, v.data(), row.data());
        CpuOps(SPARKV_SIMD_AUTO)->unpack_value(layout, row.data(), back.data());
        for (size_t j = 0; j < v.size(); ++j) {
          const double x = HalfToFloat(v[j]);
          product += x * HalfToFloat(back[j]);
          energy += x * x;
        }
      }
      EXPECT_NEAR(product / energy, 1.0, TrellisBits(number) <= 2 ? 0.02 : 0.005)
          << TrellisBits(number) << " bits, D " << dim;
    }
  }
}

TEST(Rows, NaNStaysInItsOwnRow) {
  std::mt19937 rng(5);
  for (const sparkv_config& config : AllConfigs()) {
    const Table table = TableOf(LayoutOf(config, 64), HardWeights(64, 0, rng));
    const KeyLayout& layout = table.key;
    if (layout.kept < 2) continue;
    const std::vector<uint16_t> k = HardRow(64, 8, rng);
    std::vector<uint8_t> row(layout.bytes);
    std::vector<uint16_t> back(64);
    PackKey(CpuOps(SPARKV_SIMD_PLAIN), layout, table.table.data(), k.data(), row.data());
    CpuOps(SPARKV_SIMD_PLAIN)->unpack_key(layout, table.table.data(), row.data(), back.data());
    int nan = 0;
    for (const uint16_t h : back) nan += std::isnan(HalfToFloat(h)) ? 1 : 0;
    EXPECT_GT(nan, 0) << Name(config);
  }
}

TEST(Rows, UnpackRefusesHostileBytes) {
  sparkv_config config = Blank();
  ASSERT_EQ(sparkv_config_preset(&config, "spark-0.5-i5", nullptr), SPARKV_OK);
  std::mt19937 rng(9);
  const KeyLayout layout = LayoutOf(config, 80);
  const Table table = TableOf(layout, HardWeights(80, 0, rng));
  const std::vector<uint16_t> k = HardRow(80, 0, rng);
  std::vector<uint8_t> row(sparkv_key_row_bytes(&config, 80));
  std::vector<uint16_t> back(80);
  sparkv_error error{};
  ASSERT_EQ(sparkv_pack_key(&config, table.a.data(), k.data(), 80, row.data(), row.size(), &error),
            SPARKV_OK)
      << error.text;
  ASSERT_EQ(
      sparkv_unpack_key(&config, table.a.data(), row.data(), row.size(), 80, back.data(), &error),
      SPARKV_OK);

  EXPECT_EQ(sparkv_unpack_key(&config, table.a.data(), row.data(), row.size() - 1, 80, back.data(),
                              &error),
            SPARKV_INVALID);
  EXPECT_NE(std::strstr(error.text, "row_size"), nullptr) << error.text;
  EXPECT_EQ(sparkv_unpack_key(&config, nullptr, row.data(), row.size(), 80, back.data(), &error),
            SPARKV_INVALID);
  std::vector<uint8_t> bad = row;
  bad[2] ^= 1;  // one channel more or less
  EXPECT_EQ(
      sparkv_unpack_key(&config, table.a.data(), bad.data(), bad.size(), 80, back.data(), &error),
      SPARKV_CORRUPT);
  EXPECT_NE(std::strstr(error.text, "mask"), nullptr) << error.text;
  // Rows with tiers: nothing behind the planes, no gain where there are no bits.
  sparkv_config tiers = Blank();
  ASSERT_EQ(sparkv_config_preset(&tiers, "tiers-4210", nullptr), SPARKV_OK);
  for (const auto& [dim, fall] : {std::pair(40, std::array{8, 8, 8}), {64, {31, 31, 31}}}) {
    const KeyLayout key = Falling(SPARKV_TIERS_4210, dim, fall);
    std::vector<uint16_t> weights(size_t(dim), 0x3c00u), x(size_t(dim), 0x3800u);
    for (int t = 0; t < 3; ++t) SetTierFall(t, fall[size_t(t)], weights.data());
    for (int j = 0; j < dim; ++j) weights[size_t(j)] |= uint16_t(j / (dim / 4));
    std::vector<uint8_t> bytes(key.bytes);
    ASSERT_EQ(
        sparkv_pack_key(&tiers, weights.data(), x.data(), dim, bytes.data(), bytes.size(), &error),
        SPARKV_OK);
    ASSERT_EQ(sparkv_unpack_key(&tiers, weights.data(), bytes.data(), bytes.size(), dim, x.data(),
                                &error),
              SPARKV_OK);
    std::vector<uint8_t> wrong = bytes;
    if (key.tier_bits[3] == 0) {
      wrong[2] |= 0x80;
    } else {
      ASSERT_LT(key.planes.end, key.bytes);
      wrong.back() = 1;
    }
    EXPECT_EQ(sparkv_unpack_key(&tiers, weights.data(), wrong.data(), wrong.size(), dim, x.data(),
                                &error),
              SPARKV_CORRUPT)
        << dim;
  }
  std::vector<uint16_t> poison = table.a;
  poison[4] = 0x7c00u;
  EXPECT_EQ(
      sparkv_unpack_key(&config, poison.data(), row.data(), row.size(), 80, back.data(), &error),
      SPARKV_CORRUPT);
}

TEST(LogGrid, CeilAndNearestAreWhatTheySay) {
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> octave(-15.0f, 15.0f);
  for (int i = 0; i < 20000; ++i) {
    const float x = std::exp2(octave(rng));
    const int e = KeyScaleGrid::Ceil(x, 0x1p-8f);
    ASSERT_GE(KeyScaleGrid::Value(e) * (1.0f + 0x1p-8f), x * 0.999999f);
    if (e > 1) {
      ASSERT_LT(KeyScaleGrid::Value(e - 1) * (1.0f + 0x1p-8f), x * 1.000001f);
    }
    const int v = ValueScaleGrid::Ceil(x, 0x1p-9f);
    ASSERT_EQ(ValueScaleGrid::Ceil(ValueScaleGrid::Value(v), 0x1p-9f), v);
  }
  for (int e = 1; e < 256; ++e) ASSERT_EQ(MeanGrid::Nearest(MeanGrid::Value(e)), e);
  for (int e = 1; e < 1023; ++e) ASSERT_EQ(KeyScaleGrid::Ceil(KeyScaleGrid::Value(e), 0x1p-8f), e);
  for (int r = 1; r <= kMaxRatio; ++r)
    ASSERT_NEAR(RatioValue(r), std::exp2((kRatioOne - r) / 4.0), 1e-6 * RatioValue(r));
  EXPECT_EQ(RatioValue(0), 0.0f);
  EXPECT_EQ(KeyScaleGrid::Ceil(0.0f, 0x1p-8f), 0);
}

}  // namespace
}  // namespace sparkv::test

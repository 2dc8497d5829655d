// The GPU's kernels, run by the emulator, against attention in double precision over the same rows.
#include <gtest/gtest.h>

#include "gpu_emulator.h"
// After it: kernels find its names.
#include "format/trellis.h"
#include "gpu_case.h"
#include "ops/gpu/step-inl.h"

namespace sparkv::test {
namespace {

// Codes at every place of every lane, the bits of other lanes the opposite.
template <int kBits, typename Expect>
void ForEachCode(Expect&& expect) {
  for (int code = 0; code < 2 << kBits; ++code) {
    for (int t = 0; t < 4; ++t) {
      for (int place = 0; place < 8; ++place) {
        uint32_t plane[kBits + 1];
        for (int k = 0; k <= kBits; ++k) {
          const uint32_t bit = 1u << (4 * place + t);
          plane[k] = code >> k & 1 ? bit : ~bit;
        }
        expect(plane, t, place, kTrellisLevels[kBits].level[code]);
      }
    }
  }
}

template <int kBits>
void ExpectLevels() {
  ForEachCode<kBits>([](const auto& plane, int t, int place, int level) {
    uint32_t out[4];
    gpu::Levels<kBits>(plane, t, out);
    ASSERT_EQ(place < 4 ? gpu::LowOf(out[place]) : gpu::HighOf(out[place - 4]), float(level))
        << kBits;
  });
}

template <int kBits>
void ExpectByteLevels() {
  ForEachCode<kBits>([](const auto& plane, int t, int place, int level) {
    uint32_t out[2], below[2] = {};
    gpu::ByteLevels<kBits>(plane, t, out, below);
    const auto byte = [&](const uint32_t(&from)[2]) {
      return int8_t(from[place / 4] >> (place % 4 * 8));
    };
    ASSERT_EQ(byte(out) - byte(below), level) << kBits;
  });
}

TEST(Gpu, LevelsAreThoseOfTheFormat) {
  ExpectByteLevels<1>();
  ExpectByteLevels<2>();
  ExpectByteLevels<3>();
  ExpectLevels<1>();
  ExpectLevels<2>();
  ExpectLevels<3>();
  ExpectLevels<4>();
  ExpectLevels<5>();
  ExpectLevels<6>();
  ExpectLevels<7>();
}

uint64_t HashOf(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
  return hash;
}

// Part of the format: must never change.
TEST(Gpu, PagesLieAsTheyAlwaysDid) {
  uint64_t hash = 0;
  for (const int dim : {64, 128, 256}) {
    std::vector<uint16_t> weights(static_cast<size_t>(dim));
    for (int t = 0; t < kTiers - 1; ++t) SetTierFall(t, 8, weights.data());
    for (const auto& [keys, values] :
         {std::pair(SPARKV_TIERS_6321, SPARKV_TRELLIS3), std::pair(SPARKV_INT8, SPARKV_INT8)}) {
      const KeyLayout key =
          KeyLayout::Make(dim, dim, keys, SPARKV_RECOVER_ZERO).Under(weights.data());
      const ValueLayout value = ValueLayout::Make(dim, values);
      std::vector<uint8_t> rows(kPageRows * std::max(key.bytes, value.bytes)), page(rows.size());
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = uint8_t(i * i % 251);
      PackKeyPage(key, rows.data(), page.data());
      hash = hash * 31 + HashOf(page);
      PackValuePage(value, rows.data(), page.data());
      hash = hash * 31 + HashOf(page);
    }
  }
  EXPECT_EQ(hash, 0xf26b70bd904c3f1fu);
}

TEST(Gpu, PagesHoldTheBitsOfTheirRows) {
  std::mt19937 rng(1);
  for (const int dim : {64, 128, 256}) {
    for (int keys = SPARKV_F16; keys <= SPARKV_TIERS_4210; ++keys) {
      if (keys != SPARKV_F16 && keys != SPARKV_INT8 && keys < SPARKV_TIERS_7543) continue;
      std::vector<uint16_t> weights(static_cast<size_t>(dim));
      for (int t = 0; t < kTiers - 1; ++t) SetTierFall(t, int(rng() % 32), weights.data());
      const KeyLayout layout =
          KeyLayout::Make(dim, dim, sparkv_number(keys), SPARKV_RECOVER_ZERO).Under(weights.data());
      std::vector<uint8_t> rows(kPageRows * layout.bytes), page(rows.size()), back(rows.size());
      for (uint8_t& byte : rows) byte = uint8_t(rng());
      PackKeyPage(layout, rows.data(), page.data());
      UnpackKeyPage(layout, page.data(), back.data());
      ASSERT_EQ(rows, back) << dim << " " << keys;
    }
    for (int values = SPARKV_F16; values <= SPARKV_TRELLIS1; ++values) {
      if (values != SPARKV_F16 && values != SPARKV_INT8 && values < SPARKV_TRELLIS4) continue;
      const ValueLayout layout = ValueLayout::Make(dim, sparkv_number(values));
      std::vector<uint8_t> rows(kPageRows * layout.bytes), page(rows.size()), back(rows.size());
      for (uint8_t& byte : rows) byte = uint8_t(rng());
      PackValuePage(layout, rows.data(), page.data());
      UnpackValuePage(layout, page.data(), back.data());
      ASSERT_EQ(rows, back) << dim << " " << values;
    }
  }
}

constexpr int kSharedBytes = 227 << 10;

double ErrorOf(const GpuCase& c, int multiprocessors = 1) {
  const gpu::Device device{multiprocessors, kSharedBytes};
  std::vector<sparkv_gpu_rows> rows;
  std::vector<float> out;
  sparkv_gpu_step step = c.Step(&rows, &out);
  gpu::Plan plan;
  if (Status s = gpu::MakePlan(&step, device, &plan); !s.ok()) {
    ADD_FAILURE() << s.text;
    return 1e30;
  }
  std::vector<uint4> workspace(plan.bytes / sizeof(uint4), uint4{~0u, ~0u, ~0u, ~0u});
  step.workspace = workspace.data();
  step.workspace_size = plan.bytes;
  if (Status s = gpu::Attend(&step, device); !s.ok()) {
    ADD_FAILURE() << s.text;
    return 1e30;
  }
  return c.Error(out);
}

double ErrorOf(const GpuShape& shape, unsigned seed, int multiprocessors = 1) {
  return ErrorOf(GpuCase(shape, seed), multiprocessors);
}

constexpr double kNear = 3e-5;

TEST(Gpu, EqualsTheReferenceForEveryRowFormat) {
  for (const int dim : {64, 128, 256}) {
    for (const auto& [keys, values] : kPageFormats) {
      GpuShape shape;
      shape.head_dim = dim;
      shape.group = 3;
      shape.stores = {{keys, values, {dim == 64 ? 300 : 77}}};
      EXPECT_LT(ErrorOf(shape, 1), kNear) << dim << " " << keys;
    }
  }
}

TEST(Gpu, EqualsTheReferenceForGroupsSequencesAndHoles) {
  for (const int group : kGroups)
    EXPECT_LT(ErrorOf(ShapeOfGroup(group, {1, 0, 32, 300}), 2, 4), kNear) << group;
}

TEST(Gpu, EqualsTheReferenceOverAllStoresTogether) {
  EXPECT_LT(ErrorOf(ShapeOfAllStores(100, 200), 3), kNear);
}

TEST(Gpu, RowsThatAreNotFiniteSpoilTheirSequenceAlone) {
  for (const GpuShape& shape : ShapesThatAreNotFinite(40))
    EXPECT_LT(ErrorOf(shape, 4), kNear) << shape.stores[0].keys;
}

TEST(Gpu, EqualsTheReferenceForLongRows) {
  for (const auto& [keys, values] : {std::pair(SPARKV_TIERS_7432, SPARKV_TRELLIS4),
                                     std::pair(SPARKV_TIERS_5321, SPARKV_TRELLIS2)}) {
    GpuShape shape;
    shape.group = 5;
    shape.repeat = 12;
    shape.stores = {{keys, values, {64, 32}}};
    EXPECT_LT(ErrorOf(shape, 7), kNear) << keys;
  }
}

TEST(Gpu, QueriesThatAreNotFiniteHaveNoAnswer) {
  GpuShape shape;
  shape.kv_heads = 2;
  shape.stores = {{SPARKV_TIERS_4210, SPARKV_TRELLIS1, {40}}};
  GpuCase c(shape, 5);
  c.q[3] = NAN;
  for (int j = 0; j < shape.head_dim; ++j) c.want[size_t(j)] = NAN;
  EXPECT_LT(ErrorOf(c), kNear);
}

TEST(Gpu, PagesWithoutRowsAreNotRead) { EXPECT_LT(ErrorOf(ShapeWithoutAPage(), 6), kNear); }

TEST(Gpu, RefusesWhatItCannotCompute) {
  GpuShape shape;
  shape.stores = {{SPARKV_TIERS_6321, SPARKV_TRELLIS3, {5}}};
  const GpuCase c(shape, 1);
  gpu::Device device{1, kSharedBytes};
  const auto refusal = [&](auto&& change) {
    std::vector<sparkv_gpu_rows> rows;
    std::vector<float> out;
    sparkv_gpu_step step = c.Step(&rows, &out);
    alignas(16) static uint8_t workspace[1 << 16];
    step.workspace = workspace;
    step.workspace_size = sizeof(workspace);
    change(step, rows[0]);
    return gpu::Attend(&step, device).text;
  };
  using Rows = sparkv_gpu_rows;
  using Step = sparkv_gpu_step;
  EXPECT_EQ(refusal([](Step&, Rows&) {}), "");
  EXPECT_EQ(gpu::Attend(nullptr, device).text, "step: NULL");
  const auto has = [&](const char* text, auto&& change) {
    EXPECT_NE(refusal(change).find(text), std::string::npos) << text << " | " << refusal(change);
  };
  has("struct_size: 1", [](Step& s, Rows&) { s.struct_size = 1; });
  has("stores[0].struct_size: 7", [](Step&, Rows& r) { r.struct_size = 7; });
  has("sequences: 0", [](Step& s, Rows&) { s.sequences = 0; });
  has("sequences: 70000", [](Step& s, Rows&) { s.sequences = 70000; });
  has("kv_heads: -1", [](Step& s, Rows&) { s.kv_heads = -1; });
  has("kv_heads: 2147483647", [](Step& s, Rows&) { s.kv_heads = s.group = INT32_MAX; });
  has("head_dim: 96", [](Step& s, Rows&) { s.head_dim = 96; });
  has("n_stores: 5", [](Step& s, Rows&) { s.n_stores = 5; });
  has("stores[0].max_pages: 0", [](Step&, Rows& r) { r.max_pages = 0; });
  has("stores[0].keys, values: 7, 0", [](Step&, Rows& r) { r.values = SPARKV_F16; });
  has("stores[0].keys, values: 4, 4", [](Step&, Rows& r) { r.keys = r.values = SPARKV_INT4; });
  has("stores[0].weights: NULL", [](Step&, Rows& r) { r.weights = nullptr; });
  has("stores[0].n_rows: NULL", [](Step&, Rows& r) { r.n_rows = nullptr; });
  has("stores[0].pages of keys or values", [](Step&, Rows& r) { r.value_pages = nullptr; });
  has("q: NULL", [](Step& s, Rows&) { s.q = nullptr; });
  has("out: NULL", [](Step& s, Rows&) { s.out = nullptr; });
  has("workspace: NULL", [](Step& s, Rows&) { s.workspace = nullptr; });
  has("stores[0].keys, values: 99, 99", [](Step&, Rows& r) { r.keys = r.values = 99; });
  has("workspace_size: 100 is below", [](Step& s, Rows&) { s.workspace_size = 100; });
  device.shared_bytes = 16 << 10;
  has("stores[0]: pages do not fit the device's shared memory of 16384", [](Step&, Rows&) {});
}

}  // namespace
}  // namespace sparkv::test

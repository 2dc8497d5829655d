// Rows that packing finds hard, and the configurations and instruction sets to try them with.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "ops/op_table.h"
#include "sparkv/sparkv.h"

#if defined(__x86_64__)
namespace sparkv::emulated_amx {  // emulated_amx.cc
void PrepareQueries(const KeyLayout&, const float*, const QueryBlock&, const Scratch&);
void AttendPackedTile(const KeyLayout&, const ValueLayout&, const QueryBlock&, const PackedTile&,
                      const uint64_t*, const uint16_t* const*, const Scratch&,
                      const AttentionState&);
void AttendDense(const QueryBlock&, const DenseTile&, const uint64_t*, const uint16_t* const*,
                 const Scratch&, const AttentionState&);
}  // namespace sparkv::emulated_amx
#endif

namespace sparkv::test {

// AMX on plain loops, NULL where there is no AVX-512 with bf16.
inline const OpTable* EmulatedAmx() {
#if defined(__x86_64__)
  const OpTable* beside = CpuOps(SPARKV_SIMD_AVX512);
  if (beside == nullptr || !__builtin_cpu_supports("avx512bf16")) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // Minutes there, which say nothing where the real one is checked too.
  if (CpuOps(SPARKV_SIMD_AMX) != nullptr) return nullptr;
#endif
  static const OpTable ops{"emulated_amx",
                           beside->pack_keys,
                           beside->pack_values,
                           beside->unpack_key,
                           beside->unpack_value,
                           emulated_amx::PrepareQueries,
                           emulated_amx::AttendPackedTile,
                           emulated_amx::AttendDense};
  return &ops;
#else
  return nullptr;
#endif
}

inline std::vector<const OpTable*> AllOps() {
  std::vector<const OpTable*> all;
  for (const sparkv_simd simd : {SPARKV_SIMD_PLAIN, SPARKV_SIMD_AVX2, SPARKV_SIMD_AVX512,
                                 SPARKV_SIMD_AMX, SPARKV_SIMD_NEON}) {
    if (const OpTable* ops = CpuOps(simd)) all.push_back(ops);
  }
  if (const OpTable* ops = EmulatedAmx()) all.push_back(ops);
  return all;
}

inline const int kHeadDims[] = {32, 40, 64, 72, 80, 96, 112, 128, 136, 192, 256, 320, 512};

inline void PackKey(const OpTable* ops, const KeyLayout& layout, const float* table,
                    const uint16_t* k, uint8_t* row) {
  ops->pack_keys(layout, 1, &table, &k, &row);
}
inline void PackValue(const OpTable* ops, const ValueLayout& layout, const uint16_t* v,
                      uint8_t* row) {
  ops->pack_values(layout, 1, &v, &row);
}

// Kind 0: heavy tails and outlier channels. 1: exact ties. 2: mostly zeros. 3: one channel carries
// all. 4: near the ends of f16. 5: tiny. 6: all zero. 7: one value only. 8: NaN and infinity among
// numbers.
constexpr int kKinds = 9;
inline std::vector<uint16_t> HardRow(int head_dim, int kind, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> channel(0, head_dim - 1), small(-3, 3);
  std::vector<uint16_t> row(static_cast<size_t>(head_dim));
  for (int j = 0; j < head_dim; ++j) {
    float x = normal(rng) * std::exp(0.7f * normal(rng)) * (j % 17 == 3 ? 12.0f : 1.0f);
    if (kind == 1) x = float(small(rng));
    if (kind == 2) x = j % 5 == 0 ? x : 0.0f;
    if (kind == 3) x = x * 1e-3f;
    if (kind == 4) x = x * (j % 2 == 0 ? 20000.0f : 3e-5f);
    if (kind == 5) x = x * 2e-6f;
    if (kind == 6) x = j % 2 == 0 ? 0.0f : -0.0f;
    if (kind == 7) x = -0.75f;
    if (std::fabs(x) > 65000.0f) x = 65000.0f;
    row[size_t(j)] = FloatToHalf(x);
  }
  if (kind == 3) row[size_t(channel(rng))] = FloatToHalf(50.0f);
  if (kind == 8) {
    row[size_t(channel(rng))] = 0x7e00u;
    row[size_t(channel(rng))] = 0xfc00u;
  }
  return row;
}

inline std::vector<float> HardWeights(int head_dim, int kind, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> u(static_cast<size_t>(head_dim));
  for (int j = 0; j < head_dim; ++j) {
    u[size_t(j)] = std::exp(1.2f * normal(rng));
    if (kind == 1 && j % 7 == 0) u[size_t(j)] = 0.0f;  // dead channels
    if (kind == 2) u[size_t(j)] = 0.0f;                // nothing observed
    if (kind == 3) u[size_t(j)] = j % 2 == 0 ? 1e-9f : 1e3f;
  }
  return u;
}
constexpr int kWeightKinds = 4;

inline sparkv_config Blank() {
  sparkv_config config{};
  config.struct_size = sizeof(config);
  return config;
}

inline std::vector<sparkv_config> TierConfigs() {
  std::vector<sparkv_config> all;
  for (const char* preset :
       {"tiers-7543", "tiers-7432", "tiers-6321", "tiers-5321", "tiers-4210"}) {
    all.push_back(Blank());
    sparkv_config_preset(&all.back(), preset, nullptr);
  }
  return all;
}

inline std::vector<sparkv_config> SparkConfigs() {
  std::vector<sparkv_config> all;
  for (const double ratio : {0.0, 0.3, 0.5, 0.8, 0.97, 1.0}) {
    for (const int kept : {SPARKV_F16, SPARKV_INT8, SPARKV_INT6, SPARKV_INT5, SPARKV_INT4}) {
      for (const int recover : {SPARKV_RECOVER_ZERO, SPARKV_RECOVER_MEAN, SPARKV_RECOVER_PAPER}) {
        sparkv_config config = Blank();
        sparkv_config_preset(&config, "spark-0.5", nullptr);
        config.ratio = ratio;
        config.kept = kept;
        config.recover = recover;
        config.values = kept == SPARKV_F16    ? SPARKV_F16
                        : kept == SPARKV_INT8 ? SPARKV_INT8
                                              : SPARKV_INT4;
        all.push_back(config);
      }
    }
  }
  return all;
}

inline std::vector<sparkv_config> AllConfigs() {
  std::vector<sparkv_config> all = SparkConfigs();
  for (const sparkv_config& config : TierConfigs()) all.push_back(config);
  return all;
}

inline std::string Name(const sparkv_config& config) {
  char text[256];
  sparkv_config_text(&config, text, sizeof(text));
  return text;
}

}  // namespace sparkv::test

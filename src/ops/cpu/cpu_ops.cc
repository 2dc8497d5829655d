#include "ops/op_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparkv {

#define SPARKV_DECLARE_PACK(isa)                                                     \
  namespace isa {                                                                    \
  void PackKeys(const KeyLayout&, int, const float* const*, const uint16_t* const*,  \
                uint8_t* const*);                                                    \
  void PackValues(const ValueLayout&, int, const uint16_t* const*, uint8_t* const*); \
  void UnpackKey(const KeyLayout&, const float*, const uint8_t*, uint16_t*);         \
  void UnpackValue(const ValueLayout&, const uint8_t*, uint16_t*);                   \
  }

// The attention of `isa` beside the packing of `pack`.
#define SPARKV_DECLARE_OPS(isa, pack)                                                            \
  namespace isa {                                                                                \
  void PrepareQueries(const KeyLayout&, const float*, const QueryBlock&, const Scratch&);        \
  void AttendPackedTile(const KeyLayout&, const ValueLayout&, const QueryBlock&,                 \
                        const PackedTile&, const uint64_t*, const uint16_t* const*,              \
                        const Scratch&, const AttentionState&);                                  \
  void AttendDense(const QueryBlock&, const DenseTile&, const uint64_t*, const uint16_t* const*, \
                   const Scratch&, const AttentionState&);                                       \
  constexpr OpTable kOps{                                                                        \
      #isa,           pack::PackKeys,   pack::PackValues, pack::UnpackKey, pack::UnpackValue,    \
      PrepareQueries, AttendPackedTile, AttendDense};                                            \
  }

SPARKV_DECLARE_PACK(plain)
SPARKV_DECLARE_OPS(plain, plain)
#if defined(__aarch64__)
SPARKV_DECLARE_OPS(neon, plain)
#endif
#if defined(__x86_64__)
SPARKV_DECLARE_PACK(avx2)
SPARKV_DECLARE_OPS(avx2, avx2)
SPARKV_DECLARE_PACK(avx512)
SPARKV_DECLARE_OPS(avx512, avx512)
SPARKV_DECLARE_OPS(amx, avx512)

namespace {
// __builtin_cpu_supports of clang 14 does not know the name.
bool HasF16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool HasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && HasF16c();
}
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}
// Linux gives a process the matrix registers when it asks, and not where a thread has an alternate
// signal stack that would not hold them (8 KiB more; such stacks are refused from then on).
bool HasAmx() {
#if defined(__linux__)
  constexpr int kAskForState = 0x1023,
                kMatrixState = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kConversions = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  if (!HasAvx512() || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 ||
      (eax & kConversions) == 0 || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 ||
      (edx & kBf16) == 0 || (edx & kTiles) == 0)
    return false;
  static const bool allowed = syscall(SYS_arch_prctl, kAskForState, kMatrixState) == 0;
  return allowed;
#else
  return false;
#endif
}
}  // namespace
#endif

const OpTable* CpuOps(sparkv_simd wish) {
  if (wish == SPARKV_SIMD_PLAIN) return &plain::kOps;
#if defined(__x86_64__)
  if (wish == SPARKV_SIMD_AVX2) return HasAvx2() ? &avx2::kOps : nullptr;
  if (wish == SPARKV_SIMD_AVX512) return HasAvx512() ? &avx512::kOps : nullptr;
  if (wish == SPARKV_SIMD_AMX) return HasAmx() ? &amx::kOps : nullptr;
  if (wish == SPARKV_SIMD_AUTO)
    return HasAmx()      ? &amx::kOps
           : HasAvx512() ? &avx512::kOps
           : HasAvx2()   ? &avx2::kOps
                         : &plain::kOps;
#elif defined(__aarch64__)
  if (wish == SPARKV_SIMD_NEON || wish == SPARKV_SIMD_AUTO) return &neon::kOps;
#else
  if (wish == SPARKV_SIMD_AUTO) return &plain::kOps;
#endif
  return nullptr;
}

}  // namespace sparkv

// Packed rows through the C ABI, with a layout, weights and bytes of the fuzzer's choice.
//
// - Hostile bytes are unpacked or refused as corrupt, and nothing outside the row is touched.
// - Any row of halves packs, and the row that comes back packs to the same bytes.
// - Every instruction set of this machine writes and reads the same.
#include <sparkv/sparkv.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

void Require(bool holds, const char* what, const sparkv_error& error) {
  if (holds) return;
  std::fprintf(stderr, "expected: %s; last error: %s\n", what, error.text);
  std::abort();
}

// Hands out the input from its front; zeros when it has run out.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  std::vector<T> Take(size_t n) {
    std::vector<T> taken(n);  // of exactly this size, so that a step beyond it is seen
    const size_t bytes = std::min(size_, n * sizeof(T));
    if (bytes != 0) std::memcpy(taken.data(), data_, bytes);
    data_ += bytes;
    size_ -= bytes;
    return taken;
  }
  std::vector<float> TakePositive(size_t n) {
    std::vector<float> taken = Take<float>(n);
    for (float& x : taken) x = std::isfinite(x) ? std::fabs(x) : 1.0f;
    return taken;
  }
  int Below(int n) { return Take<uint8_t>(1)[0] % n; }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  sparkv_error error{};
  sparkv_config config{};
  config.struct_size = sizeof config;
  Require(sparkv_config_preset(&config, nullptr, &error) == SPARKV_OK, "a default", error);
  constexpr int kValueNumbers[] = {SPARKV_F16,      SPARKV_INT8,     SPARKV_INT4,
                                   SPARKV_TRELLIS4, SPARKV_TRELLIS3, SPARKV_TRELLIS2,
                                   SPARKV_TRELLIS1};
  config.recover = input.Below(3);
  config.kept = input.Below(SPARKV_TIERS_4210 + 1);
  config.values = kValueNumbers[input.Below(6)];
  config.ratio = input.Below(101) / 100.0;
  if (config.kept >= SPARKV_TIERS_7543) config.ratio = 0.0;
  const int dim = 32 + 8 * input.Below(61);

  const std::vector<float> weight = input.TakePositive(dim);
  const std::vector<float> energy = input.TakePositive(dim);
  std::vector<uint16_t> table(dim);
  Require(sparkv_make_table(&config, weight.data(), energy.data(), dim, table.data(), &error) ==
              SPARKV_OK,
          "a table of finite numbers", error);

  const std::vector<uint16_t> row_in = input.Take<uint16_t>(dim);
  const size_t key_bytes = sparkv_key_row_bytes(&config, dim);
  const size_t value_bytes = sparkv_value_row_bytes(&config, dim);
  if (key_bytes == 0) return 0;  // f16, everything pruned, nothing restored
  const std::vector<uint8_t> hostile_key = input.Take<uint8_t>(key_bytes);
  const std::vector<uint8_t> hostile_value = input.Take<uint8_t>(value_bytes);

  std::vector<uint8_t> first_key, first_value;
  for (const int simd : {SPARKV_SIMD_PLAIN, SPARKV_SIMD_AVX2, SPARKV_SIMD_AVX512, SPARKV_SIMD_AMX,
                         SPARKV_SIMD_NEON}) {
    config.simd = simd;
    std::vector<uint16_t> back(dim);
    std::vector<uint8_t> key = hostile_key, value = hostile_value;
    const auto unpack_key = [&] {
      return sparkv_unpack_key(&config, table.data(), key.data(), key_bytes, dim, back.data(),
                               &error);
    };
    const auto unpack_value = [&] {
      return sparkv_unpack_value(&config, value.data(), value_bytes, dim, back.data(), &error);
    };
    const auto pack_key = [&](const uint16_t* k) {
      return sparkv_pack_key(&config, table.data(), k, dim, key.data(), key_bytes, &error);
    };
    const auto pack_value = [&](const uint16_t* v) {
      return sparkv_pack_value(&config, v, dim, value.data(), value_bytes, &error);
    };

    sparkv_status status = unpack_key();
    if (status == SPARKV_UNSUPPORTED) continue;  // not on this machine
    Require(status == SPARKV_OK || status == SPARKV_CORRUPT, "a key or a corrupt one", error);
    status = unpack_value();
    Require(status == SPARKV_OK || status == SPARKV_CORRUPT, "a value or a corrupt one", error);

    Require(pack_key(row_in.data()) == SPARKV_OK, "a key packs", error);
    Require(pack_value(row_in.data()) == SPARKV_OK, "a value packs", error);
    if (first_key.empty()) {
      first_key = key;
      first_value = value;
    }
    Require(key == first_key, "every instruction set packs a key alike", error);
    Require(value == first_value, "every instruction set packs a value alike", error);

    Require(unpack_key() == SPARKV_OK, "a packed key unpacks", error);
    Require(pack_key(back.data()) == SPARKV_OK && key == first_key, "a key packs as before", error);
    Require(unpack_value() == SPARKV_OK, "a packed value unpacks", error);
    Require(pack_value(back.data()) == SPARKV_OK && value == first_value, "a value packs as before",
            error);
  }
  return 0;
}

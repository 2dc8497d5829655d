// A fixed small case to count instructions of: steps PRESET SIMD N makes a cache of 512 tokens and
// decodes N tokens over it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sparkv/sparkv.h"

namespace {

constexpr int kTokens = 512, kDim = 64, kKvHeads = 3, kHeads = 9;

void Check(sparkv_status status, const sparkv_error& error) {
  if (status == SPARKV_OK) return;
  std::fprintf(stderr, "steps: %s\n", error.text);
  std::exit(1);
}

// Numbers of a fixed sequence in [-1, 1), a few channels larger than the rest.
std::vector<float> Numbers(size_t n, uint32_t seed) {
  std::vector<float> numbers(n);
  uint32_t state = seed;
  for (size_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    numbers[i] = float(int32_t(state)) * 0x1p-31f * (i % 19 == 0 ? 4.0f : 1.0f);
  }
  return numbers;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  sparkv_error error{};
  sparkv_config config{};
  config.struct_size = sizeof(config);
  Check(sparkv_config_preset(&config, argv[1], &error), error);
  Check(sparkv_config_set(&config, "simd", argv[2], &error), error);
  Check(sparkv_config_set(&config, "threads", "1", &error), error);
  const sparkv_layer_shape layer{kKvHeads, kDim, kDim};
  sparkv_shape shape{};
  shape.struct_size = sizeof(shape);
  shape.n_layers = 1;
  shape.layers = &layer;
  shape.cells_per_stream = kTokens;
  shape.n_streams = 1;
  sparkv_cache* cache = nullptr;
  Check(sparkv_cache_create(&config, &shape, &cache, &error), error);

  constexpr int64_t kBatch = 128;
  constexpr size_t kRow = size_t{kKvHeads} * kDim, kQuery = size_t{kHeads} * kDim;
  const std::vector<float> rows = Numbers(size_t(kTokens) * kRow * 2, 1);
  const std::vector<float> queries = Numbers(size_t(kBatch) * kQuery, 2);
  std::vector<float> out(queries.size());
  std::vector<uint16_t> mask(size_t(kBatch) * kTokens);
  const auto attend = [&](int64_t n_tokens, bool causal) {
    sparkv_attend_args args{};
    args.struct_size = sizeof(args);
    args.n_streams = 1;
    args.n_tokens = n_tokens;
    args.n_kv = kTokens;
    args.n_heads = kHeads;
    args.scale = 1.0f / std::sqrt(float(kDim));
    args.q = queries.data();
    args.q_head_stride = kDim * sizeof(float);
    args.q_token_stride = kQuery * sizeof(float);
    args.mask = causal ? mask.data() : nullptr;
    args.mask_token_stride = size_t(kTokens) * sizeof(uint16_t);
    args.out = out.data();
    Check(sparkv_cache_attend(cache, &args, &error), error);
  };
  for (int64_t first = 0; first < kTokens; first += kBatch) {
    std::vector<int64_t> cells;
    std::fill(mask.begin(), mask.end(), uint16_t{0xfc00});
    for (int64_t t = 0; t < kBatch; ++t) {
      cells.push_back(first + t);
      // More than the window, so that rows are packed; not all, to save time.
      const int64_t sees = std::min<int64_t>(first + t + 1, 128);
      std::fill_n(mask.begin() + t * kTokens + first + t + 1 - sees, sees, uint16_t{0});
    }
    const float* keys = rows.data() + size_t(first) * kRow;
    Check(sparkv_cache_write_keys(cache, 0, cells.data(), kBatch, keys, SPARKV_ROW_F32, kRow * 4,
                                  &error),
          error);
    Check(sparkv_cache_write_values(cache, 0, cells.data(), kBatch, keys + size_t(kTokens) * kRow,
                                    SPARKV_ROW_F32, kRow * 4, &error),
          error);
    attend(kBatch, true);
  }
  for (int n = std::atoi(argv[3]); n > 0; --n) attend(1, false);
  sparkv_cache_free(cache);
  return 0;
}

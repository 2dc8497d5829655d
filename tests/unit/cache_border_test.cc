// The border to the host: bad arguments, memory that cannot be had.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>

#include "cache_model.h"

namespace sparkv::test {
namespace {

TEST(CacheBorder, EveryBadArgumentIsNamedAndLeavesTheCacheUsable) {
  Model model;
  model.streams = 2;
  Host host(model);
  host.Feed(0, 1, 0, 20, {20});
  sparkv_cache* c = host.cache;
  sparkv_error* e = &host.error;
  const int64_t cells[2] = {30, 31}, twice[2] = {30, 30}, far[2] = {30, 512};
  std::vector<float> rows(4096), out(4096);
  std::vector<uint16_t> halves(65536);
  std::vector<uint16_t> mask(256, 0);
  std::vector<int32_t> delta(600, 1);
  sparkv_attend_args args{};
  args.struct_size = sizeof(args);
  args.n_streams = 1;
  args.n_kv = 32;
  args.n_tokens = 1;
  args.n_heads = 6;
  args.scale = 0.1f;
  args.q = rows.data();
  args.q_head_stride = 128;
  args.q_token_stride = args.q_stream_stride = 768;
  args.out = out.data();
  const auto attend = [&](const std::function<void(sparkv_attend_args*)>& spoil) {
    sparkv_attend_args bad = args;
    spoil(&bad);
    return sparkv_cache_attend(c, &bad, e);
  };
  sparkv_rope rope{sizeof(rope), 32, 0, 1, 4096, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f, nullptr};
  const auto rotate = [&](const std::function<void(sparkv_rope*)>& spoil) {
    sparkv_rope bad = rope;
    spoil(&bad);
    return sparkv_cache_rotate_keys(c, 0, delta.data(), 10, &bad, e);
  };
  const sparkv_layer_shape good_layer{1, 64, 64};
  const auto create =
      [&](const std::function<void(sparkv_config*, sparkv_shape*, sparkv_layer_shape*)>& spoil) {
        sparkv_config config = MakeConfig(Model{});
        sparkv_layer_shape layer = good_layer;
        sparkv_shape shape{sizeof(shape), 1, &layer, 64, 1, nullptr, 0};
        spoil(&config, &shape, &layer);
        sparkv_cache* made = nullptr;
        const sparkv_status status = sparkv_cache_create(&config, &shape, &made, e);
        sparkv_cache_free(made);
        return status;
      };
  const auto F32 = SPARKV_ROW_F32;
  struct Case {
    const char* word;
    std::function<sparkv_status()> call;
  };
  const std::vector<Case> cases = {
      {"cache",
       [&] { return sparkv_cache_write_keys(nullptr, 0, cells, 2, rows.data(), F32, 256, e); }},
      {"layer", [&] { return sparkv_cache_write_keys(c, 2, cells, 2, rows.data(), F32, 256, e); }},
      {"layer",
       [&] { return sparkv_cache_write_values(c, -1, cells, 2, rows.data(), F32, 320, e); }},
      {"cells",
       [&] { return sparkv_cache_write_keys(c, 0, nullptr, 2, rows.data(), F32, 256, e); }},
      {"cells", [&] { return sparkv_cache_write_keys(c, 0, twice, 2, rows.data(), F32, 256, e); }},
      {"cells", [&] { return sparkv_cache_write_keys(c, 0, far, 2, rows.data(), F32, 256, e); }},
      {"rows", [&] { return sparkv_cache_write_keys(c, 0, cells, 2, nullptr, F32, 256, e); }},
      {"n_rows", [&] { return sparkv_cache_write_keys(c, 0, cells, 0, rows.data(), F32, 256, e); }},
      {"n_rows",
       [&] {
         return sparkv_cache_write_keys(c, 0, cells, int64_t{1} << 40, rows.data(), F32, 256, e);
       }},
      {"values",
       [&] { return sparkv_cache_write_values(c, 0, cells, 2, rows.data(), F32, 320, e); }},
      {"cache", [&] { return sparkv_cache_attend(nullptr, &args, e); }},
      {"args", [&] { return sparkv_cache_attend(c, nullptr, e); }},
      {"struct_size", [&] { return attend([](auto* a) { a->struct_size = 8; }); }},
      {"layer", [&] { return attend([](auto* a) { a->layer = 9; }); }},
      {"first_stream", [&] { return attend([](auto* a) { a->first_stream = 2; }); }},
      {"first_stream", [&] { return attend([](auto* a) { a->first_stream = -1; }); }},
      {"n_streams", [&] { return attend([](auto* a) { a->n_streams = 3; }); }},
      {"n_streams", [&] { return attend([](auto* a) { a->n_streams = 0; }); }},
      {"n_streams", [&] { return attend([](auto* a) { a->first_stream = 1, a->n_streams = 2; }); }},
      {"n_kv", [&] { return attend([](auto* a) { a->n_kv = 257; }); }},
      {"n_kv", [&] { return attend([](auto* a) { a->n_kv = 0; }); }},
      {"n_tokens", [&] { return attend([](auto* a) { a->n_tokens = 0; }); }},
      {"n_tokens", [&] { return attend([](auto* a) { a->n_tokens = int64_t{1} << 40; }); }},
      {"n_heads", [&] { return attend([](auto* a) { a->n_heads = 5; }); }},
      {"n_heads", [&] { return attend([](auto* a) { a->n_heads = 0; }); }},
      {"q", [&] { return attend([](auto* a) { a->q = nullptr; }); }},
      {"q_", [&] { return attend([](auto* a) { a->q_head_stride = 129; }); }},
      {"out", [&] { return attend([](auto* a) { a->out = nullptr; }); }},
      {"max_bias", [&] { return attend([](auto* a) { a->max_bias = 8.0f; }); }},
      {"layer", [&] { return sparkv_cache_read_keys(c, 2, 0, 1, halves.data(), e); }},
      {"first", [&] { return sparkv_cache_read_keys(c, 0, -1, 1, halves.data(), e); }},
      {"n", [&] { return sparkv_cache_read_values(c, 0, 510, 3, halves.data(), e); }},
      {"n", [&] { return sparkv_cache_read_values(c, 0, 0, INT64_MAX, halves.data(), e); }},
      {"rows", [&] { return sparkv_cache_read_values(c, 0, 0, 1, nullptr, e); }},
      {"first", [&] { return sparkv_cache_restore_keys(c, 0, 513, 0, halves.data(), e); }},
      {"n", [&] { return sparkv_cache_restore_values(c, 0, 0, -1, halves.data(), e); }},
      {"rows", [&] { return sparkv_cache_restore_keys(c, 0, 0, 1, nullptr, e); }},
      {"from", [&] { return sparkv_cache_copy_keys(c, 0, 2, 0, e); }},
      {"to", [&] { return sparkv_cache_copy_values(c, 0, 0, -1, e); }},
      {"layer", [&] { return sparkv_cache_copy_values(c, 5, 0, 1, e); }},
      {"delta", [&] { return sparkv_cache_rotate_keys(c, 0, nullptr, 10, &rope, e); }},
      {"rope", [&] { return sparkv_cache_rotate_keys(c, 0, delta.data(), 10, nullptr, e); }},
      {"n", [&] { return sparkv_cache_rotate_keys(c, 0, delta.data(), 513, &rope, e); }},
      {"struct_size", [&] { return rotate([](auto* r) { r->struct_size = 4; }); }},
      {"n_rot", [&] { return rotate([](auto* r) { r->n_rot = 34; }); }},
      {"n_rot", [&] { return rotate([](auto* r) { r->n_rot = 31; }); }},
      {"n_rot", [&] { return rotate([](auto* r) { r->n_rot = 0; }); }},
      {"first_channel", [&] { return rotate([](auto* r) { r->first_channel = 1; }); }},
      {"first_channel", [&] { return rotate([](auto* r) { r->first_channel = -1; }); }},
      {"bytes", [&] { return sparkv_cache_load_weights(c, nullptr, 10, e); }},
      {"config", [&] { return sparkv_cache_create(nullptr, nullptr, nullptr, e); }},
      {"struct_size", [&] { return create([](auto*, auto* s, auto*) { s->struct_size = 1; }); }},
      {"layers", [&] { return create([](auto*, auto* s, auto*) { s->layers = nullptr; }); }},
      {"n_layers", [&] { return create([](auto*, auto* s, auto*) { s->n_layers = 0; }); }},
      {"n_layers", [&] { return create([](auto*, auto* s, auto*) { s->n_layers = -3; }); }},
      {"n_streams", [&] { return create([](auto*, auto* s, auto*) { s->n_streams = 0; }); }},
      {"cells_per_stream",
       [&] { return create([](auto*, auto* s, auto*) { s->cells_per_stream = 0; }); }},
      {"cells_per_stream",
       [&] { return create([](auto*, auto* s, auto*) { s->cells_per_stream = INT64_MAX; }); }},
      {"n_kv_heads", [&] { return create([](auto*, auto*, auto* l) { l->n_kv_heads = 0; }); }},
      {"k_dim", [&] { return create([](auto*, auto*, auto* l) { l->k_dim = 68; }); }},
      {"v_dim", [&] { return create([](auto*, auto*, auto* l) { l->v_dim = 520; }); }},
      {"ratio", [&] { return create([](auto* k, auto*, auto*) { k->ratio = NAN; }); }},
      {"window", [&] { return create([](auto* k, auto*, auto*) { k->window = -1; }); }},
      {"kept", [&] { return create([](auto* k, auto*, auto*) { k->kept = 77; }); }},
      {"simd", [&] { return create([](auto* k, auto*, auto*) { k->simd = 9; }); }},
  };
  int i = 0;
  for (const Case& bad : cases) {
    host.error = {};
    EXPECT_EQ(bad.call(), SPARKV_INVALID)
        << "case " << i << " " << bad.word << ": " << host.error.text;
    EXPECT_NE(std::strstr(host.error.text, bad.word), nullptr)
        << "case " << i << ": " << host.error.text;
    EXPECT_EQ(std::strchr(host.error.text, '\n'), nullptr);
    ++i;
  }
  // No error struct is fine too.
  EXPECT_EQ(sparkv_cache_attend(c, nullptr, nullptr), SPARKV_INVALID);
  sparkv_cache_free(nullptr);
  sparkv_cache_clear(nullptr);
  sparkv_cache_set_threads(nullptr, 3);
  sparkv_cache_set_team(nullptr, nullptr);
  sparkv_cache_release(c, -5, 10);
  sparkv_cache_release(c, 512, 10);
  sparkv_cache_release(nullptr, 0, 1);
  sparkv_cache_memory(c, nullptr);
  EXPECT_EQ(
      sparkv_cache_saliency(c, 0, 7, 10, out.data(), reinterpret_cast<uint8_t*>(halves.data())), 0);
  EXPECT_EQ(host.Memory().tokens, 20);
  const Step step = host.Begin({{0, Content(1, 20)}});
  EXPECT_TRUE(Near(host.Run(step)[0], host.Expected(step.sees[0]), kSums));
}

TEST(CacheBorder, AConfigurationOfAnotherSizeIsRefused) {
  sparkv_config config = MakeConfig(Model{});
  config.struct_size = 16;
  const sparkv_layer_shape layer{1, 64, 64};
  const sparkv_shape shape{sizeof(shape), 1, &layer, 64, 1, nullptr, 0};
  sparkv_cache* cache = nullptr;
  sparkv_error error{};
  EXPECT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_INVALID);
  EXPECT_NE(std::strstr(error.text, "struct_size"), nullptr) << error.text;
  sparkv_cache_free(cache);
}

TEST(CacheBorder, AStepLargerThanMemoryIsAnErrorAndNoMore) {
  Model model;
  model.cells = int64_t{1} << 26;
  model.layers = {{1, 32, 32, 1}};
  const sparkv_layer_shape layer{1, 32, 32};
  const sparkv_shape shape{sizeof(shape), 1, &layer, model.cells, 1, nullptr, 0};
  const sparkv_config config = MakeConfig(model);
  sparkv_cache* cache = nullptr;
  sparkv_error error{};
  ASSERT_EQ(sparkv_cache_create(&config, &shape, &cache, &error), SPARKV_OK) << error.text;
  sparkv_attend_args args{};
  args.struct_size = sizeof(args);
  args.n_streams = 1;
  args.n_kv = model.cells;
  args.n_tokens = 1 << 24;
  args.n_heads = 1;
  float q[32] = {}, out[32];
  args.q = q;
  args.out = out;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_EQ(sparkv_cache_attend(cache, &args, &error), SPARKV_NO_MEMORY) << error.text;
#endif
  sparkv_cache_free(cache);
}

// Runs the body in a process of its own with this much address space; true when it returns true.
bool InChild(rlim_t bytes, const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limit{bytes, bytes};
    setrlimit(RLIMIT_AS, &limit);
    _exit(body() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(CacheBorder, AddressSpaceThatCannotBeHadIsSaid) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers need the address space";
#endif
  for (const auto& [cells, what] :
       {std::pair<int64_t, const char*>{1 << 20, "dense window"}, {int64_t{1} << 28, "cells"}}) {
    EXPECT_TRUE(InChild(rlim_t{1} << 30, [cells = cells, what = what] {
      const sparkv_config config = MakeConfig(Model{});
      const sparkv_layer_shape layer{8, 128, 128};
      const sparkv_shape shape{sizeof(shape), 1, &layer, cells, 1, nullptr, 0};
      sparkv_cache* cache = nullptr;
      sparkv_error error{};
      const sparkv_status status = sparkv_cache_create(&config, &shape, &cache, &error);
      if (status != SPARKV_NO_MEMORY) std::fprintf(stderr, "status %d: %s\n", status, error.text);
      return status == SPARKV_NO_MEMORY && cache == nullptr &&
             std::strstr(error.text, what) != nullptr;
    })) << what;
  }
}

// A host that writes behind n_kv breaks the contract; it must not cost a slot each time.
TEST(CacheBorder, CellsWrittenBehindNKvDoNotLeak) {
  Model model;
  model.cells = 512;
  model.set = {{"window", "64"}};
  Host host(model);
  host.Feed(0, 1, 0, 10, {10});
  uint64_t resident = 0;
  for (int i = 0; i < 40; ++i) {
    Step step = host.Begin({{0, Content(1, 10 + i)}});
    step.cells[0] = 400;
    host.Run(step);
    host.Forget(0, 10, 11);
    if (i == 2) resident = host.Memory().resident;
  }
  EXPECT_LE(host.Memory().resident, resident);
  EXPECT_LE(host.Memory().tokens, 11);
}

}  // namespace
}  // namespace sparkv::test

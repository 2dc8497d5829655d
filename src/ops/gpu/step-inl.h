// A step's kernels, from the description that the C ABI takes. Compiled by nvcc for a GPU, and by
// the host's compiler for the emulator.
#pragma once

#include <algorithm>
#include <string>

#include "base/status.h"
#include "ops/gpu/attend-inl.h"
#include "ops/gpu/pages.h"
#include "sparkv/gpu.h"

namespace sparkv::gpu {

struct Store {
  KeyLayout key;
  ValueLayout value;
  int n_shares;
};

struct Plan {
  int n_blocks, n_entries;
  Store stores[kMostStores];
  size_t bytes;  // of the workspace
};

// body.operator()<D>() for a head size that pages allow.
template <typename Body>
auto WithHeadDim(int head_dim, Body&& body) {
  if (head_dim == 64) return body.template operator()<64>();
  if (head_dim == 128) return body.template operator()<128>();
  return body.template operator()<256>();
}

struct Device {
  int multiprocessors, shared_bytes;  // shared memory that a block may ask for
};

inline Status MakePlan(const sparkv_gpu_step* step, const Device& device, Plan* plan) {
  if (step == nullptr) return Status::Invalid("step: NULL");
  if (step->struct_size != sizeof(*step))
    return Status::Invalid("struct_size: " + std::to_string(step->struct_size) + " is not " +
                           std::to_string(sizeof(*step)));
  const auto positive = [](const char* field, int32_t value) {
    return value > 0
               ? Status::Ok()
               : Status::Invalid(std::string(field) + ": " + std::to_string(value) + " is below 1");
  };
  if (Status s = positive("sequences", step->sequences); !s.ok()) return s;
  if (Status s = positive("kv_heads", step->kv_heads); !s.ok()) return s;
  if (Status s = positive("group", step->group); !s.ok()) return s;
  if (!PagesAllowed(step->head_dim))
    return Status::Unsupported("head_dim: " + std::to_string(step->head_dim) +
                               " is not 64, 128 or 256");
  if (step->sequences > 65535)  // blocks of a grid in z, then in y
    return Status::Unsupported("sequences: " + std::to_string(step->sequences) + " is above 65535");
  const int64_t n_blocks = (int64_t(step->group) + 7) / 8, blocks = step->kv_heads * n_blocks;
  if (blocks > 65535)
    return Status::Unsupported("kv_heads: " + std::to_string(step->kv_heads) + " by groups of " +
                               std::to_string(step->group) + " are above 65535 blocks");
  if (step->n_stores < 1 || step->n_stores > kMostStores || step->stores == nullptr)
    return Status::Invalid("n_stores: " + std::to_string(step->n_stores) + " is outside 1.." +
                           std::to_string(kMostStores) + ", or no stores");

  plan->n_blocks = int(n_blocks);
  const int64_t entries = blocks * step->sequences;
  if (entries > (1 << 24)) return Status::Unsupported("sequences: too many for one step");
  plan->n_entries = int(entries);
  int64_t shares = 0;
  for (int i = 0; i < step->n_stores; ++i) {
    const sparkv_gpu_rows& rows = step->stores[i];
    const std::string name = "stores[" + std::to_string(i) + "].";
    Store& store = plan->stores[i];
    if (rows.struct_size != sizeof(rows))
      return Status::Invalid(name + "struct_size: " + std::to_string(rows.struct_size) +
                             " is not " + std::to_string(sizeof(rows)));
    if (rows.max_pages < 1 || rows.max_pages > (1 << 26))
      return Status::Invalid(name + "max_pages: " + std::to_string(rows.max_pages) +
                             " is outside 1..2^26");
    const auto known = [](int32_t number) { return number >= 0 && number <= SPARKV_TRELLIS1; };
    bool allowed = known(rows.keys) && known(rows.values);
    if (allowed) {
      store.key = KeyLayout::Make(step->head_dim, step->head_dim, sparkv_number(rows.keys),
                                  SPARKV_RECOVER_ZERO);
      store.value = ValueLayout::Make(step->head_dim, sparkv_number(rows.values));
      allowed = PagesAllowed(store.key, store.value);
    }
    if (!allowed)
      return Status::Unsupported(name + "keys, values: " + std::to_string(rows.keys) + ", " +
                                 std::to_string(rows.values) +
                                 " are not tiers with trellis, or both int8, or both f16");
    // A warp has two pages or more, if there are as many, and a multiprocessor five blocks: as many
    // of the leanest kernels run at once.
    const int most = (rows.max_pages + 2 * kWarps - 1) / (2 * kWarps);
    store.n_shares = std::clamp(5 * device.multiprocessors / plan->n_entries, 1, most);
    shares += store.n_shares;
  }
  int large = -1;  // a store whose pages do not fit
  WithHeadDim(step->head_dim, [&]<int D>() {
    static_assert(sizeof(Prepared<D>) % 16 == 0 && sizeof(Share<D>) % 16 == 0);
    for (int i = 0; i < step->n_stores; ++i) {
      const Store& store = plan->stores[i];
      const int stages = store.key.tiered()                ? TierKeys<D, 1>::kStages
                         : store.key.number == SPARKV_INT8 ? ByteKeys<D, 1>::kStages
                                                           : DenseKeys<D, 1>::kStages;
      const size_t bytes =
          SharedBytes<D>(stages, kPageRows * store.key.bytes, kPageRows * store.value.bytes);
      if (bytes > size_t(device.shared_bytes)) large = i;
    }
    plan->bytes = size_t(plan->n_entries) * (size_t(step->n_stores) * sizeof(Prepared<D>) +
                                             size_t(shares) * sizeof(Share<D>));
  });
  if (large >= 0)
    return Status::Unsupported("stores[" + std::to_string(large) +
                               "]: pages do not fit the device's shared memory of " +
                               std::to_string(device.shared_bytes) + " bytes per block");
  return Status::Ok();
}

inline Status CheckPointers(const sparkv_gpu_step& step, const Plan& plan) {
  if (step.q == nullptr || step.out == nullptr)
    return Status::Invalid(step.q == nullptr ? "q: NULL" : "out: NULL");
  if (step.workspace == nullptr || reinterpret_cast<uintptr_t>(step.workspace) % 16 != 0)
    return Status::Invalid("workspace: NULL or not aligned to 16 bytes");
  if (step.workspace_size < plan.bytes)
    return Status::Invalid("workspace_size: " + std::to_string(step.workspace_size) + " is below " +
                           std::to_string(plan.bytes));
  for (int i = 0; i < step.n_stores; ++i) {
    const sparkv_gpu_rows& rows = step.stores[i];
    const std::string name = "stores[" + std::to_string(i) + "].";
    if (rows.pages == nullptr || rows.n_rows == nullptr)
      return Status::Invalid(name + (rows.pages == nullptr ? "pages: NULL" : "n_rows: NULL"));
    if (plan.stores[i].key.tiered() && rows.weights == nullptr)
      return Status::Invalid(name + "weights: NULL, but keys with tiers need them");
    for (const void* pages : {rows.key_pages, rows.value_pages}) {
      if (pages == nullptr || reinterpret_cast<uintptr_t>(pages) % 16 != 0)
        return Status::Invalid(name + "pages of keys or values: NULL or not aligned to 16 bytes");
    }
  }
  return Status::Ok();
}

template <int D, int kQTiles>
Status LaunchStore(const Step& step, const Pages& pages, sparkv_number values, dim3 grid,
                   void* stream, const Prepared<D>* prepared, Share<D>* shares) {
  const auto launch = [&]<typename Keys, typename Values>() {
    return Launch(AttendPages<D, kQTiles, Keys, Values>, grid, kWarps * kLanes,
                  SharedBytes<D>(Keys::kStages, pages.key_bytes, pages.value_bytes), stream, step,
                  pages, prepared, shares);
  };
  using Tiers = TierKeys<D, kQTiles>;
  switch (values) {
    case SPARKV_TRELLIS4:
      return launch.template operator()<Tiers, TrellisValues<4, D, kQTiles>>();
    case SPARKV_TRELLIS3:
      return launch.template operator()<Tiers, TrellisValues<3, D, kQTiles>>();
    case SPARKV_TRELLIS2:
      return launch.template operator()<Tiers, TrellisValues<2, D, kQTiles>>();
    case SPARKV_TRELLIS1:
      return launch.template operator()<Tiers, TrellisValues<1, D, kQTiles>>();
    case SPARKV_INT8:
      return launch.template operator()<ByteKeys<D, kQTiles>, ByteValues<D, kQTiles>>();
    default:
      return launch.template operator()<DenseKeys<D, kQTiles>, DenseValues<D, kQTiles>>();
  }
}

template <int D>
Status AttendStep(const sparkv_gpu_step& step, const Plan& plan) {
  auto* prepared = static_cast<Prepared<D>*>(step.workspace);
  auto* shares =
      reinterpret_cast<Share<D>*>(prepared + size_t(plan.n_entries) * size_t(step.n_stores));
  Share<D>* const all_shares = shares;
  const Step s{step.q,        step.out,   step.kv_heads, step.group,
               plan.n_blocks, step.scale, step.softcap};
  const auto grid = [&](int x) {
    return dim3{unsigned(x), unsigned(step.kv_heads * plan.n_blocks), unsigned(step.sequences)};
  };
  Stores stores{};
  ShareList list{};
  list.n_stores = step.n_stores;
  for (int i = 0; i < step.n_stores; ++i) {
    const sparkv_gpu_rows& rows = step.stores[i];
    const Store& store = plan.stores[i];
    Pages& pages = stores.pages[i];
    pages.keys = static_cast<const uint8_t*>(rows.key_pages);
    pages.values = static_cast<const uint8_t*>(rows.value_pages);
    pages.weights = rows.weights;
    pages.table = rows.pages;
    pages.rows = rows.rows;
    pages.n_rows = rows.n_rows;
    pages.key_bytes = kPageRows * store.key.bytes;
    pages.value_bytes = kPageRows * store.value.bytes;
    pages.max_pages = rows.max_pages;
    for (const int bits : store.key.tier_bits) pages.key_sum += bits;
    list.n_shares[i] = store.n_shares;
    list.rotated[i] = store.value.rotated();
  }
  if (Status e =
          Launch(PrepareQueries<D>, grid(step.n_stores), 256, 0, step.stream, s, stores, prepared);
      !e.ok())
    return e;
  const auto launch = step.group > kQueriesPerTile ? LaunchStore<D, 2> : LaunchStore<D, 1>;
  for (int i = 0; i < step.n_stores; ++i) {
    const Store& store = plan.stores[i];
    if (Status e = launch(s, stores.pages[i], store.value.number, grid(store.n_shares), step.stream,
                          prepared, shares);
        !e.ok())
      return e;
    prepared += plan.n_entries;
    shares += size_t(plan.n_entries) * size_t(store.n_shares);
  }
  return Launch(MergeShares<D>, grid(std::min(8, step.group)), 4 * D, 0, step.stream, s, list,
                static_cast<const Share<D>*>(all_shares));
}

inline Status Attend(const sparkv_gpu_step* step, const Device& device) {
  Plan plan;
  if (Status s = MakePlan(step, device, &plan); !s.ok()) return s;
  if (Status s = CheckPointers(*step, plan); !s.ok()) return s;
  return WithHeadDim(step->head_dim, [&]<int D>() { return AttendStep<D>(*step, plan); });
}

}  // namespace sparkv::gpu

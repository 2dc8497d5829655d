// Attention on a GPU behind the C ABI.
#include <string>

#include "capi/guard.h"
#include "config/config.h"
#include "ops/gpu/step-inl.h"

namespace sparkv {
namespace {

Status FindDevice(gpu::Device* device) {
  int number = 0;
  if (Status s = gpu::StatusOf(cudaGetDevice(&number), "device"); !s.ok()) return s;
  if (Status s = gpu::StatusOf(
          cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, number),
          "device");
      !s.ok())
    return s;
  return gpu::StatusOf(cudaDeviceGetAttribute(&device->shared_bytes,
                                              cudaDevAttrMaxSharedMemoryPerBlockOptin, number),
                       "device");
}

struct PageLayouts {
  KeyLayout key;
  ValueLayout value;
};

Status LayoutsOf(const sparkv_config* config, int32_t head_dim, PageLayouts* layouts) {
  if (config == nullptr) return Status::Invalid("config: NULL");
  if (Status s = CheckConfig(*config); !s.ok()) return s;
  if (!PagesAllowed(head_dim))
    return Status::Unsupported("head_dim: " + std::to_string(head_dim) + " is not 64, 128 or 256");
  layouts->key = KeyLayout::Make(head_dim, KeptChannels(config->ratio, head_dim),
                                 sparkv_number(config->kept), sparkv_recover(config->recover));
  layouts->value = ValueLayout::Make(head_dim, sparkv_number(config->values));
  if (!PagesAllowed(layouts->key, layouts->value))
    return Status::Unsupported("config: rows of this kind have no pages");
  return Status::Ok();
}

}  // namespace
}  // namespace sparkv

using sparkv::Guard;
using sparkv::Status;

extern "C" {

size_t sparkv_gpu_workspace_bytes(const sparkv_gpu_step* step) {
  size_t bytes = 0;
  const sparkv_status status = Guard(nullptr, [&] {
    sparkv::gpu::Device device;
    if (Status s = sparkv::FindDevice(&device); !s.ok()) return s;
    sparkv::gpu::Plan plan;
    if (Status s = sparkv::gpu::MakePlan(step, device, &plan); !s.ok()) return s;
    bytes = plan.bytes;
    return Status::Ok();
  });
  return status == SPARKV_OK ? bytes : 0;
}

sparkv_status sparkv_gpu_attend(const sparkv_gpu_step* step, sparkv_error* error) {
  return Guard(error, [&] {
    sparkv::gpu::Device device;
    if (Status s = sparkv::FindDevice(&device); !s.ok()) return s;
    return sparkv::gpu::Attend(step, device);
  });
}

sparkv_status sparkv_pack_key_page(const sparkv_config* config, const uint16_t* weights,
                                   int32_t head_dim, const uint8_t* rows, uint8_t* page,
                                   sparkv_error* error) {
  return Guard(error, [&] {
    sparkv::PageLayouts layouts;
    if (Status s = sparkv::LayoutsOf(config, head_dim, &layouts); !s.ok()) return s;
    if (rows == nullptr || page == nullptr)
      return Status::Invalid(rows == nullptr ? "rows: NULL" : "page: NULL");
    if (layouts.key.tiered()) {
      if (weights == nullptr)
        return Status::Invalid("weights: NULL, but keys with tiers need them");
      layouts.key = layouts.key.Under(weights);
    }
    sparkv::PackKeyPage(layouts.key, rows, page);
    return Status::Ok();
  });
}

sparkv_status sparkv_pack_value_page(const sparkv_config* config, int32_t head_dim,
                                     const uint8_t* rows, uint8_t* page, sparkv_error* error) {
  return Guard(error, [&] {
    sparkv::PageLayouts layouts;
    if (Status s = sparkv::LayoutsOf(config, head_dim, &layouts); !s.ok()) return s;
    if (rows == nullptr || page == nullptr)
      return Status::Invalid(rows == nullptr ? "rows: NULL" : "page: NULL");
    sparkv::PackValuePage(layouts.value, rows, page);
    return Status::Ok();
  });
}

}  // extern "C"

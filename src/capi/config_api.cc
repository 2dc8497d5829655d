#include <cstring>

#include "capi/guard.h"
#include "config/config.h"
#include "config/layers.h"
#include "config/recent.h"

namespace sparkv {
namespace {

Status CheckStruct(const sparkv_config* config) {
  if (config == nullptr) return Status::Invalid("config: NULL");
  if (config->struct_size < sizeof(sparkv_config)) {
    return Status::Invalid(
        "config.struct_size: " + std::to_string(config->struct_size) +
        " is less than sizeof(sparkv_config) = " + std::to_string(sizeof(sparkv_config)));
  }
  return Status::Ok();
}

}  // namespace
}  // namespace sparkv

using sparkv::Status;

sparkv_status sparkv_config_preset(sparkv_config* config, const char* name, sparkv_error* error) {
  return sparkv::Guard(error, [&]() -> Status {
    if (Status status = sparkv::CheckStruct(config); !status.ok()) return status;
    return sparkv::SetPreset(name == nullptr ? "" : name, config);
  });
}

sparkv_status sparkv_config_set(sparkv_config* config, const char* key, const char* value,
                                sparkv_error* error) {
  return sparkv::Guard(error, [&]() -> Status {
    if (Status status = sparkv::CheckStruct(config); !status.ok()) return status;
    if (key == nullptr) return Status::Invalid("key: NULL");
    if (value == nullptr) return Status::Invalid("value: NULL");
    return sparkv::SetParameter(key, value, config);
  });
}

sparkv_status sparkv_config_layer(const sparkv_config* config, int32_t layer, int32_t n_layers,
                                  sparkv_config* out, sparkv_error* error) {
  return sparkv::Guard(error, [&]() -> Status {
    if (Status status = sparkv::CheckStruct(config); !status.ok()) return status;
    if (Status status = sparkv::CheckConfig(*config); !status.ok()) return status;
    if (out == nullptr) return Status::Invalid("out: NULL");
    sparkv_config next = *config;
    if (Status status = sparkv::SetLayer(layer, n_layers, &next); !status.ok()) return status;
    *out = next;
    return Status::Ok();
  });
}

sparkv_status sparkv_config_recent(const sparkv_config* config, int32_t stage, int32_t* until,
                                   sparkv_config* rows, sparkv_error* error) {
  return sparkv::Guard(error, [&]() -> Status {
    if (Status status = sparkv::CheckStruct(config); !status.ok()) return status;
    if (Status status = sparkv::CheckConfig(*config); !status.ok()) return status;
    if (until == nullptr) return Status::Invalid("until: NULL");
    if (rows == nullptr) return Status::Invalid("rows: NULL");
    const std::vector<sparkv::RecentStage> stages = sparkv::RecentStages(*config);
    if (stage < 0 || size_t(stage) >= stages.size()) {
      return Status::Invalid("stage: " + std::to_string(stage) + " of " +
                             std::to_string(stages.size()));
    }
    *until = stages[size_t(stage)].until;
    *rows = *config;
    rows->ratio = 0.0;
    rows->kept = stages[size_t(stage)].kept;
    rows->values = stages[size_t(stage)].values;
    return Status::Ok();
  });
}

size_t sparkv_config_text(const sparkv_config* config, char* text, size_t size) {
  if (text != nullptr && size > 0) text[0] = '\0';
  if (!sparkv::CheckStruct(config).ok()) return 0;
  try {
    const std::string line = sparkv::ConfigText(*config);
    if (text != nullptr && size > 0) {
      const size_t n = line.size() < size ? line.size() : size - 1;
      std::memcpy(text, line.data(), n);
      text[n] = '\0';
    }
    return line.size();
  } catch (...) {
    return 0;
  }
}

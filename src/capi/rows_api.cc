// Single packed rows behind the C ABI. Bytes that come in here are hostile: every field is checked
// before it is used.
#include <bit>
#include <cstring>
#include <string>

#include "base/half.h"
#include "cache/weight_tables.h"
#include "capi/guard.h"
#include "config/config.h"
#include "format/log_grid.h"
#include "ops/op_table.h"

namespace sparkv {
namespace {

struct Row {
  KeyLayout key;
  ValueLayout value;
  const OpTable* ops = nullptr;
};

Status MakeRow(const sparkv_config* config, int32_t head_dim, Row* row) {
  if (config == nullptr) return Status::Invalid("config: NULL");
  if (Status s = CheckConfig(*config); !s.ok()) return s;
  if (!HeadDimAllowed(head_dim)) {
    return Status::Invalid("head_dim: " + std::to_string(head_dim) +
                           " is outside 32..512 in steps of 8");
  }
  row->key = KeyLayout::Make(head_dim, KeptChannels(config->ratio, head_dim),
                             sparkv_number(config->kept), sparkv_recover(config->recover));
  row->value = ValueLayout::Make(head_dim, sparkv_number(config->values));
  row->ops = CpuOps(sparkv_simd(config->simd));
  if (row->ops == nullptr)
    return Status::Unsupported("simd: this CPU lacks the instruction set asked for");
  return Status::Ok();
}

Status CheckSize(size_t size, uint32_t bytes) {
  if (size == bytes) return Status::Ok();
  return Status::Invalid("row_size: " + std::to_string(size) + " is not the row's " +
                         std::to_string(bytes) + " bytes");
}

Status CheckTable(const KeyLayout& layout, const uint16_t* table) {
  if (!layout.needs_table()) return Status::Ok();
  if (table == nullptr)
    return Status::Invalid("table: NULL, but this configuration packs with weights");
  for (int j = 0; j < layout.head_dim; ++j) {
    if (table[j] >= 0x7c00u)
      return Status::Corrupt("table[" + std::to_string(j) + "]: negative or not finite");
  }
  return Status::Ok();
}

Status CheckPlanes(const PlaneLayout& planes, const uint8_t* row) {
  for (int p = 0; p < planes.n_planes; ++p) {
    const uint32_t spare = uint32_t(planes.numbers[p]) % 8;
    const uint32_t last = planes.at[p] + uint32_t(planes.numbers[p]) / 8;
    if (spare != 0 && row[last] >> spare != 0)
      return Status::Corrupt("plane " + std::to_string(p) +
                             ": bits behind the last one are not zero");
  }
  return Status::Ok();
}

Status CheckKeyRow(const KeyLayout& layout, const uint8_t* row) {
  if (layout.tiered()) {
    for (uint32_t at = layout.planes.end; at < layout.bytes; ++at) {
      if (row[at] != 0) return Status::Corrupt("planes: bytes behind the last one are not zero");
    }
    const uint32_t gains = uint32_t(row[0]) | uint32_t(row[1]) << 8 | uint32_t(row[2]) << 16;
    for (int t = 0; t < kTiers; ++t) {
      if (layout.tier_bits[t] == 0 && (gains >> (6 * t) & 63) != 0 && gains != 0xffffff)
        return Status::Corrupt("gain " + std::to_string(t) + ": of a tier without bits, not zero");
    }
    return CheckPlanes(layout.planes, row);
  }
  if (layout.number != SPARKV_F16 && !layout.restores() && layout.kept > 0 &&
      RatioOf(uint32_t(row[0] | row[1] << 8)) != 0) {
    return Status::Corrupt("scale: a pruned magnitude, but this row restores nothing");
  }
  if (layout.mask_bytes != 0) {
    int kept = 0;
    for (uint32_t i = 0; i < layout.mask_bytes; ++i) kept += std::popcount(row[layout.mask_at + i]);
    if (kept != layout.kept) {
      return Status::Corrupt("mask: " + std::to_string(kept) + " channels are kept instead of " +
                             std::to_string(layout.kept));
    }
  }
  // Bits behind the last sign or code are zero.
  const auto spare = [&](const char* field, uint32_t at, uint32_t bytes, uint32_t bits) {
    if (bytes == 0 || bits % 8 == 0 || row[at + bytes - 1] >> (bits % 8) == 0) return Status::Ok();
    return Status::Corrupt(std::string(field) + ": bits behind the last one are not zero");
  };
  const uint32_t kept = uint32_t(layout.kept);
  if (Status s = spare("signs", layout.sign_at, layout.sign_bytes, uint32_t(layout.pruned));
      !s.ok())
    return s;
  if (layout.number == SPARKV_F16 || layout.number == SPARKV_INT8) return Status::Ok();
  if (Status s = spare("low codes", layout.low_at, layout.low_bytes, kept * 4); !s.ok()) return s;
  return spare("high codes", layout.high_at, layout.high_bytes,
               kept * (layout.number == SPARKV_INT6 ? 2 : 1));
}

Status CheckValueRow(const ValueLayout& layout, const uint8_t* row) {
  if (layout.trellis()) return Status::Ok();
  if (layout.rotated() && row[1] >> 4 != 0)
    return Status::Corrupt("scale: bits 12..15 are not zero");
  return Status::Ok();
}

}  // namespace
}  // namespace sparkv

using sparkv::Guard;
using sparkv::Row;
using sparkv::Status;

extern "C" {

size_t sparkv_key_row_bytes(const sparkv_config* config, int32_t head_dim) {
  Row row;
  const sparkv_status status =
      Guard(nullptr, [&] { return sparkv::MakeRow(config, head_dim, &row); });
  return status == SPARKV_OK || status == SPARKV_UNSUPPORTED ? row.key.bytes : 0;
}

size_t sparkv_value_row_bytes(const sparkv_config* config, int32_t head_dim) {
  Row row;
  const sparkv_status status =
      Guard(nullptr, [&] { return sparkv::MakeRow(config, head_dim, &row); });
  return status == SPARKV_OK || status == SPARKV_UNSUPPORTED ? row.value.bytes : 0;
}

sparkv_status sparkv_make_table(const sparkv_config* config, const float* u,
                                const float* key_energy, int32_t head_dim, uint16_t* table,
                                sparkv_error* error) {
  return Guard(error, [&] {
    Row row;
    if (Status s = sparkv::MakeRow(config, head_dim, &row); !s.ok()) return s;
    if (u == nullptr || table == nullptr)
      return Status::Invalid(u == nullptr ? "u: NULL" : "table: NULL");
    if (row.key.tiered()) {
      if (key_energy == nullptr) return Status::Invalid("key_energy: NULL, but tiers need it");
      float query_energy[sparkv::kMaxHeadDim];
      for (int j = 0; j < head_dim; ++j) query_energy[j] = u[j] * u[j];
      sparkv::MakeTierTable(query_energy, key_energy, head_dim, table);
      return Status::Ok();
    }
    sparkv::MakeTable(row.key.recover, u, head_dim, table);
    return Status::Ok();
  });
}

sparkv_status sparkv_pack_key(const sparkv_config* config, const uint16_t* table, const uint16_t* k,
                              int32_t head_dim, uint8_t* row, size_t row_size,
                              sparkv_error* error) {
  return Guard(error, [&] {
    Row r;
    if (Status s = sparkv::MakeRow(config, head_dim, &r); !s.ok()) return s;
    if (Status s = sparkv::CheckSize(row_size, r.key.bytes); !s.ok()) return s;
    if (k == nullptr || row == nullptr)
      return Status::Invalid(k == nullptr ? "k: NULL" : "row: NULL");
    float weights[sparkv::kWeightParts * sparkv::kMaxHeadDim];
    if (Status s = sparkv::CheckTable(r.key, table); !s.ok()) return s;
    if (r.key.needs_table()) {
      sparkv::ExpandTable(table, head_dim, weights);
      r.key = r.key.Under(table);
    }
    const float* all_weights = weights;
    r.ops->pack_keys(r.key, 1, &all_weights, &k, &row);
    return Status::Ok();
  });
}

sparkv_status sparkv_unpack_key(const sparkv_config* config, const uint16_t* table,
                                const uint8_t* row, size_t row_size, int32_t head_dim, uint16_t* k,
                                sparkv_error* error) {
  return Guard(error, [&] {
    Row r;
    if (Status s = sparkv::MakeRow(config, head_dim, &r); !s.ok()) return s;
    if (Status s = sparkv::CheckSize(row_size, r.key.bytes); !s.ok()) return s;
    if (k == nullptr || row == nullptr)
      return Status::Invalid(k == nullptr ? "k: NULL" : "row: NULL");
    float weights[sparkv::kWeightParts * sparkv::kMaxHeadDim];
    if (Status s = sparkv::CheckTable(r.key, table); !s.ok()) return s;
    if (r.key.needs_table()) {
      sparkv::ExpandTable(table, head_dim, weights);
      r.key = r.key.Under(table);
    }
    if (Status s = sparkv::CheckKeyRow(r.key, row); !s.ok()) return s;
    r.ops->unpack_key(r.key, weights, row, k);
    return Status::Ok();
  });
}

sparkv_status sparkv_pack_value(const sparkv_config* config, const uint16_t* v, int32_t head_dim,
                                uint8_t* row, size_t row_size, sparkv_error* error) {
  return Guard(error, [&] {
    Row r;
    if (Status s = sparkv::MakeRow(config, head_dim, &r); !s.ok()) return s;
    if (Status s = sparkv::CheckSize(row_size, r.value.bytes); !s.ok()) return s;
    if (v == nullptr || row == nullptr)
      return Status::Invalid(v == nullptr ? "v: NULL" : "row: NULL");
    r.ops->pack_values(r.value, 1, &v, &row);
    return Status::Ok();
  });
}

sparkv_status sparkv_unpack_value(const sparkv_config* config, const uint8_t* row, size_t row_size,
                                  int32_t head_dim, uint16_t* v, sparkv_error* error) {
  return Guard(error, [&] {
    Row r;
    if (Status s = sparkv::MakeRow(config, head_dim, &r); !s.ok()) return s;
    if (Status s = sparkv::CheckSize(row_size, r.value.bytes); !s.ok()) return s;
    if (v == nullptr || row == nullptr)
      return Status::Invalid(v == nullptr ? "v: NULL" : "row: NULL");
    if (Status s = sparkv::CheckValueRow(r.value, row); !s.ok()) return s;
    r.ops->unpack_value(r.value, row, v);
    return Status::Ok();
  });
}

}  // extern "C"

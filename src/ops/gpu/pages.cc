#include "ops/gpu/pages.h"

#include <cstring>

namespace sparkv {
namespace {

enum class Way { kToPage, kToRows };

// Visits every bit of the planes of one row: move(byte and bit in the row, word and bit in the
// page).
template <typename Move>
void VisitKeyBits(const KeyLayout& l, int row, Move&& move) {
  const int per_tier = l.per_tier();
  uint32_t tier_at = kKeyPageGains / 4;
  for (int t = 0; t < kTiers; ++t) {
    for (int p = 0; p < l.tier_bits[t]; ++p) {
      for (int i = 0; i < per_tier; ++i) {
        const PageBit to = KeyPageBit(per_tier, l.tier_bits[t], row, p, i);
        move(l.planes.at[p], t * per_tier + i, tier_at + to.word, to.bit);
      }
    }
    tier_at += TierWords(per_tier, l.tier_bits[t]);
  }
}

template <typename Move>
void VisitValueBits(const ValueLayout& l, int row, Move&& move) {
  for (int p = 0; p < l.planes.n_planes; ++p) {
    for (int i = 0; i < l.head_dim; ++i) {
      const PageBit to = ValuePageBit(l.head_dim, row, p, i);
      move(l.planes.at[p], i, kValuePageGains / 4 + to.word, to.bit);
    }
  }
}

// One bit from row to page or back; both start as zeros.
template <Way kWay, typename Row, typename Page>
auto Mover(Row* row, Page* page) {
  return [=](uint32_t plane_at, int number, uint32_t word, int bit) {
    auto& row_byte = row[plane_at + unsigned(number) / 8];
    auto& page_byte = page[4 * word + unsigned(bit) / 8];
    if constexpr (kWay == Way::kToPage) {
      page_byte = uint8_t(page_byte | (row_byte >> (number % 8) & 1) << (bit % 8));
    } else {
      row_byte = uint8_t(row_byte | (page_byte >> (bit % 8) & 1) << (number % 8));
    }
  };
}

// | scales [32] | numbers [32] | and back.
template <Way kWay, typename Rows, typename Page>
void CopyRows(size_t scale_bytes, size_t row_bytes, Rows* rows, Page* page) {
  const size_t numbers = row_bytes - scale_bytes;
  for (size_t r = 0; r < kPageRows; ++r) {
    auto* row = rows + r * row_bytes;
    auto* scale = page + r * scale_bytes;
    auto* number = page + kPageRows * scale_bytes + r * numbers;
    if constexpr (kWay == Way::kToPage) {
      std::memcpy(scale, row, scale_bytes);
      std::memcpy(number, row + scale_bytes, numbers);
    } else {
      std::memcpy(row, scale, scale_bytes);
      std::memcpy(row + scale_bytes, number, numbers);
    }
  }
}

}  // namespace

void PackKeyPage(const KeyLayout& l, const uint8_t* rows, uint8_t* page) {
  if (!l.tiered()) return CopyRows<Way::kToPage>(l.scale_bytes, l.bytes, rows, page);
  std::memset(page, 0, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    const uint8_t* row = rows + size_t(r) * l.bytes;
    std::memcpy(page + 2 * r, row, 2);
    page[2 * kPageRows + r] = row[2];
    VisitKeyBits(l, r, Mover<Way::kToPage>(row, page));
  }
}

void UnpackKeyPage(const KeyLayout& l, const uint8_t* page, uint8_t* rows) {
  if (!l.tiered()) return CopyRows<Way::kToRows>(l.scale_bytes, l.bytes, rows, page);
  std::memset(rows, 0, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    uint8_t* row = rows + size_t(r) * l.bytes;
    std::memcpy(row, page + 2 * r, 2);
    row[2] = page[2 * kPageRows + r];
    VisitKeyBits(l, r, Mover<Way::kToRows>(row, page));
  }
}

void PackValuePage(const ValueLayout& l, const uint8_t* rows, uint8_t* page) {
  if (!l.trellis()) return CopyRows<Way::kToPage>(l.scale_bytes, l.bytes, rows, page);
  std::memset(page, 0, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    const uint8_t* row = rows + size_t(r) * l.bytes;
    page[r] = row[0];
    VisitValueBits(l, r, Mover<Way::kToPage>(row, page));
  }
}

void UnpackValuePage(const ValueLayout& l, const uint8_t* page, uint8_t* rows) {
  if (!l.trellis()) return CopyRows<Way::kToRows>(l.scale_bytes, l.bytes, rows, page);
  std::memset(rows, 0, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    uint8_t* row = rows + size_t(r) * l.bytes;
    row[0] = page[r];
    VisitValueBits(l, r, Mover<Way::kToRows>(row, page));
  }
}

bool PagesAllowed(const KeyLayout& key, const ValueLayout& value) {
  const bool same = key.number == value.number && key.pruned == 0 &&
                    (key.number == SPARKV_F16 || key.number == SPARKV_INT8);
  return PagesAllowed(key.head_dim) && key.head_dim == value.head_dim &&
         ((key.tiered() && value.trellis()) || same);
}

}  // namespace sparkv

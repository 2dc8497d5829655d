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

template <Way kWay, typename Row, typename Page>
void Copy(Row* row, Page* page, size_t bytes) {
  if constexpr (kWay == Way::kToPage) {
    std::memcpy(page, row, bytes);
  } else {
    std::memcpy(row, page, bytes);
  }
}

template <Way kWay, typename Rows, typename Page>
void Clear(Rows* rows, Page* page, size_t bytes) {
  if constexpr (kWay == Way::kToPage) {
    std::memset(page, 0, bytes);
  } else {
    std::memset(rows, 0, bytes);
  }
}

// | scales [32] | numbers [32] | and back.
template <Way kWay, typename Rows, typename Page>
void MoveRows(size_t scale_bytes, size_t row_bytes, Rows* rows, Page* page) {
  const size_t numbers = row_bytes - scale_bytes;
  for (size_t r = 0; r < kPageRows; ++r) {
    Copy<kWay>(rows + r * row_bytes, page + r * scale_bytes, scale_bytes);
    Copy<kWay>(rows + r * row_bytes + scale_bytes, page + kPageRows * scale_bytes + r * numbers,
               numbers);
  }
}

template <Way kWay, typename Rows, typename Page>
void MoveKeys(const KeyLayout& l, Rows* rows, Page* page) {
  if (!l.tiered()) return MoveRows<kWay>(l.scale_bytes, l.bytes, rows, page);
  Clear<kWay>(rows, page, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    auto* row = rows + size_t(r) * l.bytes;
    Copy<kWay>(row, page + 2 * r, 2);
    Copy<kWay>(row + 2, page + 2 * kPageRows + r, 1);
    VisitKeyBits(l, r, Mover<kWay>(row, page));
  }
}

template <Way kWay, typename Rows, typename Page>
void MoveValues(const ValueLayout& l, Rows* rows, Page* page) {
  if (!l.trellis()) return MoveRows<kWay>(l.scale_bytes, l.bytes, rows, page);
  Clear<kWay>(rows, page, size_t(kPageRows) * l.bytes);
  for (int r = 0; r < kPageRows; ++r) {
    auto* row = rows + size_t(r) * l.bytes;
    Copy<kWay>(row, page + r, 1);
    VisitValueBits(l, r, Mover<kWay>(row, page));
  }
}

}  // namespace

void PackKeyPage(const KeyLayout& layout, const uint8_t* rows, uint8_t* page) {
  MoveKeys<Way::kToPage>(layout, rows, page);
}
void UnpackKeyPage(const KeyLayout& layout, const uint8_t* page, uint8_t* rows) {
  MoveKeys<Way::kToRows>(layout, rows, page);
}
void PackValuePage(const ValueLayout& layout, const uint8_t* rows, uint8_t* page) {
  MoveValues<Way::kToPage>(layout, rows, page);
}
void UnpackValuePage(const ValueLayout& layout, const uint8_t* page, uint8_t* rows) {
  MoveValues<Way::kToRows>(layout, rows, page);
}

bool PagesAllowed(const KeyLayout& key, const ValueLayout& value) {
  const bool same = key.number == value.number && key.pruned == 0 &&
                    (key.number == SPARKV_F16 || key.number == SPARKV_INT8);
  return PagesAllowed(key.head_dim) && key.head_dim == value.head_dim &&
         ((key.tiered() && value.trellis()) || same);
}

}  // namespace sparkv

// Kept codes go to their channels, eight at a time: a byte of the mask picks the byte shuffle.
// Included inside a namespace per instruction set that has no expansion under a mask.

struct SpreadTable {
  uint8_t rank[256][8] =
      {};  // of each channel among the kept; 0x80, which gives zero, where pruned
  constexpr SpreadTable() {
    for (unsigned m = 0; m < 256; ++m) {
      uint8_t next = 0;
      for (unsigned j = 0; j < 8; ++j) rank[m][j] = (m >> j & 1) != 0 ? next++ : uint8_t(0x80);
    }
  }
};
constexpr SpreadTable kSpreads;
inline const uint8_t* Spread(unsigned mask) { return kSpreads.rank[mask]; }

// Mask of channels j .. j + 7.
inline unsigned MaskByte(const KeyLayout& layout, const uint8_t* row, int j) {
  if (layout.mask_bytes == 0) return layout.kept > 0 ? 255u : 0u;
  return row[layout.mask_at + unsigned(j) / 8];
}

inline unsigned Bits8At(const uint8_t* bytes, unsigned at) {
  return (unsigned(bytes[at / 8]) | unsigned(bytes[at / 8 + 1]) << 8) >> (at % 8) & 255u;
}

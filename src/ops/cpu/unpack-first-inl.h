// The operations of an instruction set that unpacks every tile before it attends. Included after
// attend-inl.h.

void AttendPackedTile(const KeyLayout& key, const ValueLayout& value, const QueryBlock& block,
                      const PackedTile& tile, const uint64_t* visible, const uint16_t* const* mask,
                      const Scratch& scratch, const AttentionState& state) {
  AttendPacked(key, value, block, tile, visible, mask, scratch, state);
}
void PrepareQueries(const KeyLayout& layout, const float* table, const QueryBlock& block,
                    const Scratch& scratch) {
  if (layout.tiered()) PrepareTiers(layout, table, block, scratch);
}

void AttendDense(const QueryBlock& block, const DenseTile& tile, const uint64_t* visible,
                 const uint16_t* const* mask, const Scratch& scratch, const AttentionState& state) {
  AttendDenseRows(block, tile, visible, mask, scratch, state);
}

// Rows into pages and back, on the host: for rows that a CPU packed, for tests and for tools.
#pragma once

#include "format/page_layout.h"

namespace sparkv {

// rows: kPageRows rows of `layout` (under its head's weights), one after the other; a page has
// their bytes. Layouts are those that pages allow: see PagesAllowed.
void PackKeyPage(const KeyLayout& layout, const uint8_t* rows, uint8_t* page);
void UnpackKeyPage(const KeyLayout& layout, const uint8_t* page, uint8_t* rows);
void PackValuePage(const ValueLayout& layout, const uint8_t* rows, uint8_t* page);
void UnpackValuePage(const ValueLayout& layout, const uint8_t* page, uint8_t* rows);

// Keys with tiers beside trellis-coded values; both int8, no channel pruned; both f16.
bool PagesAllowed(const KeyLayout& key, const ValueLayout& value);

}  // namespace sparkv

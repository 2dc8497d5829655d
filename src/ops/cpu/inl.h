// What the -inl.h files need, included before the namespace of the instruction set is opened.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "base/half.h"
#include "format/levels.h"
#include "format/log_grid.h"
#include "format/row_layout.h"
#include "format/trellis.h"
#include "method/select.h"
#include "ops/hadamard.h"
#include "ops/op_table.h"

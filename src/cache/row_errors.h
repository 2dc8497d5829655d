// What rows lose on their way from f16 to packed, by head: measured when it is asked for, because
// each row then has to be unpacked again. Ours.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/cache_layout.h"

namespace sparkv {

// Errors of one layer. A row is coded by every stage on its way, so the errors of the steps add up.
class RowErrors {
 public:
  // steps: stages behind the window, and packing.
  RowErrors(const LayerLayout& layer, int steps);

  // Mean squares of a token's queries by channel, [k_row].
  void AddQueries(const float* energies);
  // f16 rows of all heads before and behind a step; those with a number that is not finite count
  // for nothing. first: `before` are the numbers of the host.
  void Add(bool keys, int step, bool first, const uint16_t* before, const uint16_t* after);

  // Root of the mean square error of q . k over that of q . k, channels of queries taken to be
  // independent; and of |value error| over |value|. 0 where nothing was coded.
  double Keys(int head) const { return Relative(keys_, head, true); }
  double Values(int head) const { return Relative(values_, head, false); }

 private:
  struct Sums {
    int dim = 0;
    std::vector<double> square;              // of numbers of the host, [heads * dim]
    std::vector<std::vector<double>> error;  // [steps], the same
    int64_t rows = 0;
    std::vector<int64_t> coded;  // rows by step
  };
  double Relative(const Sums& sums, int head, bool weighted) const;

  Sums keys_, values_;
  std::vector<double> queries_;
};

}  // namespace sparkv

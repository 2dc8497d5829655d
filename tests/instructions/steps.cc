// A fixed small case to count instructions of: steps PRESET SIMD N makes a cache of 512 tokens, as
// the kernel benchmark does, and decodes N tokens over it.
#include <cstdlib>

#include "../../bench/bench.h"

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  sparkv::bench::Case c;
  c.what = "decode";
  c.side = argv[1];
  c.simd = argv[2];
  c.tokens = 512;
  const auto side = sparkv::bench::SparkvAttend(c);
  side->Prepare(c);
  for (int n = std::atoi(argv[3]); n > 0; --n) side->Step();
  return 0;
}

// A fixed small case to count instructions of: steps PRESET SIMD SEQUENCES STREAMS makes a cache as
// the kernel benchmark does, 512 tokens or, of several sequences, 256 each, and decodes a token of
// each over it, four times. Says how many rows the step finds packed.
#include <cstdio>
#include <cstdlib>

#include "../../bench/bench.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  sparkv::bench::Case c;
  c.what = "decode";
  c.side = argv[1];
  c.simd = argv[2];
  c.sequences = std::atoi(argv[3]);
  c.streams = argv[4];
  c.tokens = c.sequences == 1 ? 512 : 256;
  const auto side = sparkv::bench::SparkvAttend(c);
  std::printf("%d of %d rows packed\n", int(side->packed()), c.tokens * c.sequences);
  side->Prepare(c);
  for (int n = 0; n < 4; ++n) side->Step();
  return 0;
}

// What the kernel benchmark is made of: cases, the sides that do them, and their input.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sparkv/sparkv.h"

namespace sparkv::bench {

struct Shape {
  int dim = 64, kv_heads = 3, group = 3;
  int n_heads() const { return kv_heads * group; }
  size_t row() const { return size_t(kv_heads) * size_t(dim); }  // numbers of a key or value row
};

// One row of the table. `tokens` are cached per sequence, `queries` are asked or written per
// sequence.
struct Case {
  std::string what;  // decode, prefill, seal, append
  std::string side;  // a preset of ours or ggml-<type>
  std::string simd;  // instruction set of ours, "" = what ggml was built for
  Shape shape;
  int tokens = 0, queries = 1, threads = 1, sequences = 1;
  // Where the cells of sequences are: in a stream of their own (split), or in one for all, in which
  // a mask tells them apart: one sequence behind the other (unified) or token by token, as they
  // come when sequences are decoded together (interleaved).
  std::string streams = "split";

  bool unified() const { return streams != "split"; }
  // Of a token of a sequence, in its stream.
  int64_t CellOf(int sequence, int64_t token) const {
    if (streams == "interleaved") return token * sequences + sequence;
    return token + (unified() ? int64_t{sequence} * tokens : 0);
  }

  std::string name() const;
  bool attends() const { return what == "decode" || what == "prefill"; }
  // Attention alone has a count that does not depend on how it is done.
  double multiply_adds() const {
    return attends() ? 2.0 * queries * sequences * shape.n_heads() * tokens * shape.dim : 0.0;
  }
};

// Does cases. Made when its turn comes first, so that a filter saves time and memory; cases whose
// data is the same share one.
class Side {
 public:
  virtual ~Side() = default;
  virtual void Prepare(const Case&) {}  // before each turn, not timed
  virtual void Step() = 0;
  // What a step has to read and write of cached rows.
  virtual double bytes() const = 0;
  // Rows that it finds packed, -1: none of ours. Window and stages have the others.
  virtual int64_t packed() const { return -1; }
};

// sparkv_sides.cc
std::unique_ptr<Side> SparkvAttend(const Case& c);
std::unique_ptr<Side> SparkvSeal(const Case& c);
std::unique_ptr<Side> SparkvAppend(const Case& c);
// ggml_sides.cc; no names where ggml was not built, none of types whose blocks a head does not
// fill.
std::vector<std::string> GgmlNames(const Shape& shape);
std::unique_ptr<Side> GgmlAttend(const Case& c);
std::unique_ptr<Side> GgmlAppend(const Case& c);

// input.cc: f16 rows that look like keys (channels differ) or values, and queries.
std::vector<uint16_t> Rows(const Shape& shape, int n, bool keys);
std::vector<float> ToFloats(const std::vector<uint16_t>& rows);
std::vector<float> Queries(const Shape& shape, int n);  // [n][n_heads][dim]

[[noreturn]] void Fail(int code, const std::string& text);

}  // namespace sparkv::bench

// How far a cache is from a dense one over a text, by llama-perplexity: what eval and check share.
#ifndef SPARKV_TOOLS_DIVERGENCE_H_
#define SPARKV_TOOLS_DIVERGENCE_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "child.h"
#include "gguf.h"
#include "kv_options.h"

namespace sparkv {

// English prose that is part of the program (tools/demo/document.txt).
const char* BuiltinText();

struct Reading {
  std::string model;
  int context = 2048, batch = 512, ubatch = 128, chunks = -1, threads = 0;
  bool heads = false;   // what each head of a packed cache loses is measured, too
  int alone_every = 0;  // tokens from one that comes alone to the next, 0: none does

  std::vector<std::string> SizeFlags() const;  // for any llama.cpp program
};

// What the weights of a reading are: "unquantised", "requantised to F32" or "quantised".
std::string WeightsName(const ModelShape& shape, bool requantize);
// Quantised weights: with `requantize` `*model` becomes one with F32 weights, made once and kept in
// the user's cache folder; without, a note says what that means for the numbers.
void ChooseWeights(const ModelShape& shape, bool requantize, std::string* model);

// Heads evict when a token comes alone. Where one of `caches` evicts, the last of every `ubatch`
// tokens does in all readings, so that they stay comparable. Notes which caches begin to evict only
// after the first scored token.
void LetHeadsEvict(const std::vector<Cache>& caches, Reading* reading);

// Reads text.txt of `folder` with an f32 cache and -fa off, and leaves there what Judge needs.
void WriteBase(const Reading& reading, const TemporaryFolder& folder);
// Reads it with `cache`; `flags` come last. Bits per element, perplexity and its ratio to the base,
// KL divergence (mean, median, 99 %) and the share of equal top tokens; of a packed cache what it
// tells about itself, too.
nlohmann::json Judge(const Reading& reading, const Cache& cache, const std::string& label,
                     const TemporaryFolder& folder, const std::vector<std::string>& flags = {});

}  // namespace sparkv

#endif

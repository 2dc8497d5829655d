// The bytes of a model's KV cache, predicted from its shape: rows, sinks, dense window and one
// weight table per head. What pages leave empty shows only in a running cache.
#ifndef SPARKV_TOOLS_KV_BYTES_H_
#define SPARKV_TOOLS_KV_BYTES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "gguf.h"
#include "kv_options.h"

namespace sparkv {

// `cache` with its budget, if it has one, turned into layers of their own for a context of
// `context` tokens, as the plugin does. Throws Error(kUsage) when the budget is too small.
Cache SolveBudget(Cache cache, const ModelShape& model, int64_t context);

// Bytes of the rows of one token in one KV head.
struct RowBytes {
  double key = 0, value = 0;
  double weights = 0;  // of all tokens together
  bool operator==(const RowBytes&) const = default;
};

// ReadModelShape for a file that must have a KV cache which the model below describes. Throws
// Error(kRuntime) for latent rows (MLA) and for no KV heads at all.
ModelShape ReadCachedModelShape(const std::string& path);

// Throws Error(kRuntime) when sparkv cannot pack heads of this size, and Error(kUsage) when
// --kv-layers names a layer that the model does not have.
RowBytes BytesPerHead(const Cache& cache, const ModelShape& model, size_t layer);
// Tokens that the layer keeps in a context of `context` tokens; fewer in a windowed layer.
int64_t CellsOf(const LayerShape& layer, const ModelShape& model, int64_t context);
// Never shrinks when `context` grows.
double PredictedBytes(const Cache& cache, const ModelShape& model, int64_t context);
// Says of caches that evict that the bytes are those of a prompt, of which nothing is evicted yet.
void NoteEvictions(const std::vector<Cache>& caches);
// Numbers that the cache stands for, keys and values; a double, as any context is allowed.
double Elements(const ModelShape& model, int64_t context);

}  // namespace sparkv

#endif

// The shape of a model's cache, read from the metadata of a GGUF file. Weights are never touched.
#ifndef SPARKV_TOOLS_GGUF_H_
#define SPARKV_TOOLS_GGUF_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sparkv {

struct LayerShape {
  int32_t kv_heads = 0;   // 0: the layer keeps no KV cache
  bool windowed = false;  // sliding-window attention, its cache holds only the window

  bool operator==(const LayerShape&) const = default;
};

struct ModelShape {
  std::string architecture;
  std::string name;
  int32_t key_length = 0;
  int32_t value_length = 0;
  int32_t heads = 0;  // query heads of the first layer
  int32_t context_length = 0;
  int32_t sliding_window = 0;
  bool latent = false;     // MLA: one latent row instead of heads
  int64_t file_type = -1;  // llama.cpp's general.file_type; -1 when the file does not say
  std::vector<LayerShape> layers;

  bool Quantised() const { return file_type > 1 && file_type != 32; }  // not F32, F16, BF16
};

// Treats the file as hostile: every count is bounded by what the file can hold. Throws
// Error(kRuntime) with one line that names the file, the field and the value.
ModelShape ReadModelShape(const std::string& path);

}  // namespace sparkv

#endif

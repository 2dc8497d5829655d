#include "gguf.h"

#include <fmt/format.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>

#include "report.h"

namespace sparkv {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is little-endian");

constexpr uint64_t kMaxPairs = 1 << 16;
constexpr uint64_t kMaxKeyLength = 1 << 16;
constexpr uint64_t kMaxKeptText = 1 << 12;   // longer strings are skipped
constexpr uint64_t kMaxKeptItems = 1 << 13;  // longer arrays are skipped
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 65536;
constexpr int64_t kMaxHeadLength = 65536;

enum Type : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
  kTypes
};
constexpr uint64_t kSize[kTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

bool IsInteger(uint32_t type) {
  return type != kF32 && type != kF64 && type != kString && type != kArray;
}

struct Value {
  uint32_t type = 0;  // of the value, or of the items of an array
  bool array = false;
  std::vector<int64_t> items;  // integers and booleans; one item for a scalar
  std::string text;
};

class Reader {
 public:
  explicit Reader(const std::string& path)
      : path_(path), file_(path, std::ios::binary | std::ios::ate) {
    if (!file_) throw Error(kRuntime, fmt::format("{}: cannot be read", path));
    left_ = static_cast<uint64_t>(file_.tellg());
    file_.seekg(0);
  }

  [[noreturn]] void Fail(const std::string& field, const std::string& what) const {
    throw Error(kRuntime, fmt::format("{}: {}: {}", path_, Printable(field), what));
  }

  void Read(void* bytes, uint64_t n, const std::string& field) {
    Take(n, field);
    if (!file_.read(static_cast<char*>(bytes), static_cast<std::streamsize>(n)))
      Fail(field, "cannot be read");
  }

  void Skip(uint64_t n, const std::string& field) {
    Take(n, field);
    // ignore() stays inside the stream's buffer, where a seek would empty it.
    if (n < 4096 ? !file_.ignore(static_cast<std::streamsize>(n))
                 : !file_.seekg(static_cast<std::streamoff>(n), std::ios::cur)) {
      Fail(field, "cannot be read");
    }
  }

  template <typename T>
  T Number(const std::string& field) {
    T number;
    Read(&number, sizeof(number), field);
    return number;
  }

  std::string Text(const std::string& field, uint64_t limit) {
    const auto length = Number<uint64_t>(field);
    if (length > limit) Fail(field, fmt::format("length {} is outside 0..{}", length, limit));
    if (length > left_)
      Fail(field,
           fmt::format("length {} passes the end of the file ({} bytes left)", length, left_));
    std::string text(length, '\0');
    Read(text.data(), length, field);
    return text;
  }

  uint64_t left() const { return left_; }

 private:
  void Take(uint64_t n, const std::string& field) {
    if (n > left_)
      Fail(field, fmt::format("{} bytes pass the end of the file ({} left)", n, left_));
    left_ -= n;
  }

  std::string path_;
  std::ifstream file_;
  uint64_t left_ = 0;
};

int64_t ReadInteger(Reader* reader, uint32_t type, const std::string& field) {
  switch (type) {
    case kU8:
    case kBool:
      return reader->Number<uint8_t>(field);
    case kI8:
      return reader->Number<int8_t>(field);
    case kU16:
      return reader->Number<uint16_t>(field);
    case kI16:
      return reader->Number<int16_t>(field);
    case kU32:
      return reader->Number<uint32_t>(field);
    case kI32:
      return reader->Number<int32_t>(field);
    default:
      return reader->Number<int64_t>(field);
  }
}

void ReadArray(Reader* reader, const std::string& field, Value* value) {
  value->array = true;
  value->type = reader->Number<uint32_t>(field);
  const auto count = reader->Number<uint64_t>(field);
  if (value->type >= kTypes || value->type == kArray)
    reader->Fail(field, fmt::format("item type {} is not known", value->type));
  const uint64_t least = value->type == kString ? 8 : kSize[value->type];
  if (count > reader->left() / least) {
    reader->Fail(field, fmt::format("{} items pass the end of the file ({} bytes left)", count,
                                    reader->left()));
  }
  if (value->type == kString) {
    for (uint64_t i = 0; i < count; ++i) reader->Skip(reader->Number<uint64_t>(field), field);
  } else if (IsInteger(value->type) && count <= kMaxKeptItems) {
    for (uint64_t i = 0; i < count; ++i)
      value->items.push_back(ReadInteger(reader, value->type, field));
  } else {
    reader->Skip(count * kSize[value->type], field);
  }
}

Value ReadValue(Reader* reader, const std::string& field) {
  Value value;
  value.type = reader->Number<uint32_t>(field);
  if (value.type >= kTypes) reader->Fail(field, fmt::format("type {} is not known", value.type));
  if (value.type == kArray) {
    ReadArray(reader, field, &value);
  } else if (value.type == kString) {
    const auto length = reader->Number<uint64_t>(field);
    if (length > kMaxKeptText) {
      reader->Skip(length, field);
    } else {
      value.text.resize(length);
      reader->Read(value.text.data(), length, field);
    }
  } else if (IsInteger(value.type)) {
    value.items.push_back(ReadInteger(reader, value.type, field));
  } else {
    reader->Skip(kSize[value.type], field);
  }
  return value;
}

class Metadata {
 public:
  explicit Metadata(Reader* reader) : reader_(reader) {
    char magic[4];
    reader->Read(magic, sizeof(magic), "magic");
    if (std::memcmp(magic, "GGUF", 4) != 0) reader->Fail("magic", "not a GGUF file");
    const auto version = reader->Number<uint32_t>("version");
    if (version != 2 && version != 3)
      reader->Fail("version", fmt::format("{} is not 2 or 3", version));
    reader->Number<uint64_t>("tensor_count");
    const auto pairs = reader->Number<uint64_t>("metadata_kv_count");
    if (pairs > kMaxPairs)
      reader->Fail("metadata_kv_count", fmt::format("{} is outside 0..{}", pairs, kMaxPairs));
    for (uint64_t i = 0; i < pairs; ++i) {
      const std::string key = reader->Text(fmt::format("metadata key {}", i), kMaxKeyLength);
      if (values_.count(key)) reader->Fail(key, "stands twice in the metadata");
      values_[key] = ReadValue(reader, key);
    }
  }

  bool Has(const std::string& key) const { return values_.count(key) > 0; }

  std::string Text(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? "" : found->second.text;
  }

  std::optional<int64_t> Integer(const std::string& key, int64_t least, int64_t most) const {
    const auto found = values_.find(key);
    if (found == values_.end()) return std::nullopt;
    const Value& value = found->second;
    if (value.array || value.items.size() != 1) reader_->Fail(key, "is not an integer");
    return Check(key, value.items[0], least, most);
  }

  // A number for every layer, whether the file has one for all or one for each.
  std::optional<std::vector<int64_t>> PerLayer(const std::string& key, size_t layers, int64_t least,
                                               int64_t most) const {
    const auto found = values_.find(key);
    if (found == values_.end()) return std::nullopt;
    const Value& value = found->second;
    if (!value.array) return std::vector<int64_t>(layers, *Integer(key, least, most));
    if (value.items.size() != layers) {
      reader_->Fail(key, fmt::format("{} items for {} layers", value.items.size(), layers));
    }
    for (int64_t item : value.items) Check(key, item, least, most);
    return value.items;
  }

  bool IsArray(const std::string& key) const { return Has(key) && values_.at(key).array; }

  int64_t Required(const std::string& key, int64_t least, int64_t most) const {
    const auto number = Integer(key, least, most);
    if (!number) reader_->Fail(key, "is missing");
    return *number;
  }

 private:
  int64_t Check(const std::string& key, int64_t number, int64_t least, int64_t most) const {
    if (number < least || number > most)
      reader_->Fail(key, fmt::format("{} is outside {}..{}", number, least, most));
    return number;
  }

  Reader* reader_;
  std::map<std::string, Value> values_;
};

// Every n-th layer sees everything, the others a window: where the file does not say, llama.cpp
// knows by architecture.
int64_t KnownPeriod(const std::string& architecture) {
  static const std::map<std::string, int64_t> periods = {
      {"gemma2", 2},  {"gemma3", 6},  {"gemma3n", 5}, {"cohere2", 4},
      {"gpt-oss", 2}, {"exaone4", 4}, {"olmo2", 4}};
  const auto found = periods.find(architecture);
  return found == periods.end() ? 1 : found->second;
}

void ReadWindows(const Metadata& data, const std::string& prefix, ModelShape* shape) {
  shape->sliding_window = data.Integer(prefix + "sliding_window", 0, INT32_MAX).value_or(0);
  if (shape->sliding_window == 0) return;
  const std::string key = prefix + "sliding_window_pattern";
  if (data.IsArray(key)) {
    const auto flags = *data.PerLayer(key, shape->layers.size(), 0, 1);
    for (size_t i = 0; i < flags.size(); ++i) shape->layers[i].windowed = flags[i];
    return;
  }
  const int64_t period =
      data.Integer(key, 0, kMaxLayers).value_or(KnownPeriod(shape->architecture));
  for (size_t i = 0; i < shape->layers.size(); ++i) {
    shape->layers[i].windowed = period == 0 || static_cast<int64_t>(i) % period < period - 1;
  }
}

}  // namespace

ModelShape ReadModelShape(const std::string& path) {
  Reader reader(path);
  const Metadata data(&reader);
  ModelShape shape;
  shape.architecture = data.Text("general.architecture");
  if (shape.architecture.empty()) reader.Fail("general.architecture", "is missing");
  shape.name = Printable(data.Text("general.name"));
  shape.file_type = data.Integer("general.file_type", 0, INT32_MAX).value_or(-1);

  const std::string prefix = shape.architecture + ".";
  shape.architecture = Printable(shape.architecture);
  const std::string attention = prefix + "attention.";
  const int64_t layers = data.Required(prefix + "block_count", 1, kMaxLayers);
  const auto heads = data.PerLayer(attention + "head_count", layers, 0, kMaxHeads);
  if (!heads) reader.Fail(attention + "head_count", "is missing");
  const auto kv_heads =
      data.PerLayer(attention + "head_count_kv", layers, 0, kMaxHeads).value_or(*heads);
  for (int64_t n : kv_heads) shape.layers.push_back({static_cast<int32_t>(n), false});
  shape.heads = (*heads)[0];

  const int64_t embedding = data.Required(prefix + "embedding_length", 1, INT32_MAX);
  const int64_t head_length = shape.heads > 0 ? embedding / shape.heads : 0;
  const auto length = [&](const char* name) {
    const std::string key = attention + name;
    const int64_t number = data.Integer(key, 1, kMaxHeadLength).value_or(head_length);
    if (number < 1 || number > kMaxHeadLength) reader.Fail(key, "is missing and cannot be derived");
    return static_cast<int32_t>(number);
  };
  shape.key_length = length("key_length");
  shape.value_length = length("value_length");
  shape.context_length = data.Integer(prefix + "context_length", 0, INT32_MAX).value_or(0);
  shape.latent = data.Has(attention + "kv_lora_rank");
  ReadWindows(data, attention, &shape);
  return shape;
}

}  // namespace sparkv

// What a long evaluation has found so far, kept in a file so that a later run can go on.
#ifndef SPARKV_TOOLS_PARTIAL_H_
#define SPARKV_TOOLS_PARTIAL_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sparkv {

class PartialResults {
 public:
  // Reads `path` where it exists, else makes it, so that a place that cannot be written is known
  // before the work. "": nothing is kept. Throws naming the field where the file is damaged or its
  // `settings`, an object, are not these.
  PartialResults(const std::string& path, const nlohmann::json& settings);

  // The entry of that name, null when it is missing; each of `numbers` (JSON pointers) is a number.
  nlohmann::json Find(const std::string& name, const std::vector<std::string>& numbers) const;
  // The file then holds the entry, or, if this process is ended meanwhile, what it held before.
  void Add(const std::string& name, const nlohmann::json& entry);

 private:
  void Write() const;

  std::string path_;
  nlohmann::json all_;  // {"settings": {}, "results": {name: entry}}
};

// Size and date of a file: whether it is the same one.
std::string FileStamp(const std::string& path);
// A hash (FNV-1a) of a text, 16 hexadecimal digits.
std::string TextHash(const std::string& text);

}  // namespace sparkv

#endif

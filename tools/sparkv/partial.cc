#include "partial.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>

#include "report.h"

namespace sparkv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

[[noreturn]] void Damaged(const std::string& path, const std::string& what) {
  throw Error(kRuntime, fmt::format("{}: not from 'sparkv eval --resume': {}", path, what));
}

// Both texts may come from a file that nobody vouches for.
std::string Shown(const Json& value) {
  return Printable(value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80));
}

}  // namespace

PartialResults::PartialResults(const std::string& path, const Json& settings)
    : path_(path), all_({{"settings", settings}, {"results", Json::object()}}) {
  if (!fs::exists(path)) {
    Write();
    return;
  }
  const Json kept = Json::parse(ReadFile(path), nullptr, false);
  if (!kept.is_object()) Damaged(path, "no JSON object");
  for (const char* field : {"settings", "results"}) {
    if (!kept.contains(field) || !kept[field].is_object())
      Damaged(path, fmt::format("'{}' is no object", field));
  }
  for (const auto& [field, value] : settings.items()) {
    const Json found = kept["settings"].value(field, Json());
    if (found == value) continue;
    throw Error(kUsage, fmt::format("--resume: {} was made with {} {}, not {}", path, field,
                                    Shown(found), Shown(value)));
  }
  all_["results"] = kept["results"];
}

Json PartialResults::Find(const std::string& name, const std::vector<std::string>& numbers) const {
  const Json& results = all_["results"];
  if (!results.contains(name)) return nullptr;
  Json entry = results[name];
  for (const auto& number : numbers) {
    const Json::json_pointer pointer(number);
    // How JSON keeps what is not a number, as with a model that breaks.
    if (entry.contains(pointer) && entry[pointer].is_null()) entry[pointer] = std::nan("");
    if (!entry.contains(pointer) || !entry[pointer].is_number())
      Damaged(path_, fmt::format("'{}{}' is no number", name, number));
  }
  return entry;
}

void PartialResults::Add(const std::string& name, const Json& entry) {
  if (!path_.empty()) {
    // What another run of the same settings has added meanwhile stays.
    std::error_code failed;
    const Json now =
        fs::is_regular_file(path_, failed) ? Json::parse(ReadFile(path_), nullptr, false) : Json();
    if (now.is_object() && now.value("settings", Json()) == all_["settings"] &&
        now.value("results", Json()).is_object())
      all_["results"].update(now["results"]);
  }
  all_["results"][name] = entry;
  Write();
}

void PartialResults::Write() const {
  if (path_.empty()) return;
  ReplaceFile(path_, all_.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

std::string FileStamp(const std::string& path) {
  return fmt::format("{} bytes of {}", fs::file_size(path),
                     fs::last_write_time(path).time_since_epoch().count());
}

std::string TextHash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001b3;
  return fmt::format("{:016x}", hash);
}

}  // namespace sparkv

#include "passcode.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <random>
#include <sstream>

namespace sparkv {
namespace {

constexpr std::array<const char*, 16> kPlaces = {
    "garden gate",  "boat house",   "old archive",   "wine cellar", "clock tower", "music room",
    "north stair",  "tool shed",    "green cabinet", "post office", "glass house", "bell chamber",
    "stone bridge", "reading room", "salt store",    "lamp room"};

// std::uniform_int_distribution differs between libraries; the draw has to be the same everywhere.
uint32_t Draw(std::mt19937* random, uint32_t below) { return (*random)() % below; }

std::vector<std::string> Sentences(const std::string& prose, int words) {
  std::vector<std::string> sentences(1);
  std::istringstream stream(prose);
  int count = 0;
  for (std::string word; stream >> word;) {
    std::string& last = sentences.back();
    last += (last.empty() ? "" : " ") + word;
    ++count;
    if (!word.ends_with('.')) continue;
    if (count >= words) break;
    sentences.emplace_back();
  }
  return sentences;
}

}  // namespace

Passcodes HidePasscodes(const std::string& prose, int words, int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<const char*> places(kPlaces.begin(), kPlaces.end());
  for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[Draw(&random, i)]);
  count = std::min<int>(count, places.size());
  const auto sentences = Sentences(prose, words);
  Passcodes out;
  for (size_t s = 0, next = 0; s < sentences.size(); ++s) {
    out.text += (s ? " " : "") + sentences[s];
    // Evenly spread: the k-th of n stands after the share (k + 1/2) / n of the text.
    while (next < size_t(count) && (s + 1) * 2 * count >= (2 * next + 1) * sentences.size()) {
      const std::string code = fmt::format("{}", 1000 + Draw(&random, 9000));
      out.text += fmt::format(" The passcode of the {} is {}.", places[next], code);
      out.items.push_back(
          {fmt::format(
               "\n\nQuestion: What is the passcode of the {0}?\nAnswer: The passcode of the {0} is",
               places[next]),
           code});
      ++next;
    }
  }
  return out;
}

bool AnswersCode(const std::string& answer, const std::string& code) {
  const auto is_digit = [](unsigned char c) { return c >= '0' && c <= '9'; };
  const auto first = std::find_if(answer.begin(), answer.end(), is_digit);
  return std::string(first, std::find_if_not(first, answer.end(), is_digit)) == code;
}

}  // namespace sparkv

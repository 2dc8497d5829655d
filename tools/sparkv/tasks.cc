#include "tasks.h"

#include <ctype.h>
#include <fmt/format.h>

#include <algorithm>
#include <random>
#include <set>
#include <sstream>

#include "report.h"

namespace sparkv {
namespace {

using Strings = std::vector<std::string>;

constexpr int kKeysPerQuestion = 4;
constexpr int kLinks = 3;          // VAR lines of a chain
constexpr int kShortestList = 25;  // its winner occurs five times, no other word more than twice
constexpr const char* kPlaces[] = {"garden gate",   "boat house",   "old archive", "wine cellar",
                                   "clock tower",   "music room",   "north stair", "tool shed",
                                   "green cabinet", "post office",  "glass house", "bell chamber",
                                   "stone bridge",  "reading room", "salt store",  "lamp room"};
constexpr const char* kColours =
    "red blue green white black brown yellow grey orange purple silver golden";
constexpr const char* kThings = "box door key lamp chair boat bag clock coat desk drawer bottle";
constexpr const char* kWords =
    "apple bread cloud dance eagle field glass horse island juice king leaf moon night ocean paper "
    "queen river stone table uncle voice water yard arm ball cake dog ear fire girl hand ice jump "
    "kite lake milk nose oil pen rain ship tree van wall year air bird cat door egg fish gold hill "
    "iron job key lamp mouth nail owl park ring snow town wind bank card deer edge farm game hat "
    "ink jar knee lock map neck office pear road salt train view wheel bus corn desk engine fox "
    "garden house insect jacket kitchen letter market number orange pilot radio school";

Strings Split(const std::string& text) {
  std::istringstream stream(text);
  Strings words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

// The distributions of the standard library differ between libraries; these draws do not.
uint32_t Draw(std::mt19937* random, uint32_t below) { return (*random)() % below; }

template <typename T>
void Shuffle(std::vector<T>* items, std::mt19937* random) {
  for (size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[Draw(random, i)]);
}

Strings Sentences(const std::string& prose, int words) {
  Strings sentences(1);
  int count = 0;
  for (const auto& word : Split(prose)) {
    if (count >= words && sentences.back().empty()) break;
    std::string& last = sentences.back();
    last += (last.empty() ? "" : " ") + word;
    ++count;
    if (word.ends_with('.')) sentences.emplace_back();
  }
  if (sentences.back().empty()) sentences.pop_back();
  return sentences;
}

// The facts in their order, evenly spread: the k-th of n after the share (k + 1/2) / n of the text.
std::string Hide(const Strings& facts, const Strings& sentences) {
  std::string text;
  for (size_t s = 0, next = 0; s < sentences.size(); ++s) {
    text += (s ? " " : "") + sentences[s];
    for (; next < facts.size() && (s + 1) * 2 * facts.size() >= (2 * next + 1) * sentences.size();
         ++next) {
      text += " " + facts[next];
    }
  }
  return text;
}

Task Passcodes(const Strings& sentences, int questions, std::mt19937* random) {
  Strings places(std::begin(kPlaces), std::end(kPlaces));
  Shuffle(&places, random);
  places.resize(std::min<size_t>(questions, places.size()));
  Task task;
  Strings facts;
  for (const auto& place : places) {
    const std::string code = fmt::format("{}", 1000 + Draw(random, 9000));
    facts.push_back(fmt::format("The passcode of the {} is {}.", place, code));
    task.items.push_back(
        {fmt::format(
             "\n\nQuestion: What is the passcode of the {0}?\nAnswer: The passcode of the {0} is",
             place),
         code});
  }
  task.text = Hide(facts, sentences);
  return task;
}

Task MultiKey(const Strings& sentences, int questions, std::mt19937* random) {
  Strings keys;
  for (const auto& colour : Split(kColours)) {
    for (const auto& thing : Split(kThings)) keys.push_back(colour + " " + thing);
  }
  Shuffle(&keys, random);
  keys.resize(std::min<size_t>(kKeysPerQuestion * questions, keys.size()));
  Task task;
  Strings facts;
  uint32_t asked = 0;
  for (size_t k = 0; k < keys.size(); ++k) {
    if (k % kKeysPerQuestion == 0) asked = k + Draw(random, kKeysPerQuestion);
    const std::string code = fmt::format("{}", 1000 + Draw(random, 9000));
    facts.push_back(fmt::format("The number of the {} is {}.", keys[k], code));
    if (k != asked) continue;
    task.items.push_back(
        {fmt::format(
             "\n\nQuestion: What is the number of the {0}?\nAnswer: The number of the {0} is",
             keys[k]),
         code});
  }
  task.text = Hide(facts, sentences);
  return task;
}

Task Variables(const Strings& sentences, int questions, std::mt19937* random) {
  std::set<std::string> used;
  const auto new_name = [&] {
    std::string name;
    do {
      name.clear();
      for (int i = 0; i < 4; ++i) name += static_cast<char>('A' + Draw(random, 26));
    } while (!used.insert(name).second);
    return name;
  };
  Task task;
  Strings facts, ends(questions);
  // Link by link, so that the chains run through each other.
  for (int link = 0; link < kLinks; ++link) {
    for (int chain = 0; chain < questions; ++chain) {
      std::string value = "VAR " + ends[chain];
      if (link == 0) {
        value = fmt::format("{}", 10000 + Draw(random, 90000));
        task.items.push_back({"", value});
      }
      ends[chain] = new_name();
      facts.push_back(fmt::format("VAR {} = {}.", ends[chain], value));
    }
  }
  for (int chain = 0; chain < questions; ++chain) {
    task.items[chain].question = fmt::format(
        "\n\nQuestion: What is the numeric value of VAR {0}?\nAnswer: The numeric value of VAR {0} "
        "is",
        ends[chain]);
  }
  task.text = Hide(facts, sentences);
  return task;
}

// A fifth of a list is its winner, two tenths are two runners-up, the rest is spread evenly.
Task Words(int words, int questions, std::mt19937* random) {
  const int length = words / questions;
  if (length < kShortestList) {
    throw Error(kUsage, fmt::format("--task-words: {} words are too few for {} lists of {}", words,
                                    questions, kShortestList));
  }
  Task task;
  task.text = "Lists of words follow.";
  for (int number = 1; number <= questions; ++number) {
    Strings pool = Split(kWords), list;
    Shuffle(&pool, random);
    list.insert(list.end(), length / 5, pool[0]);
    list.insert(list.end(), length / 10, pool[1]);
    list.insert(list.end(), length / 10, pool[2]);
    for (size_t next = 3; list.size() < size_t(length); ++next) {
      list.push_back(pool[3 + (next - 3) % (pool.size() - 3)]);
    }
    Shuffle(&list, random);
    task.text += fmt::format("\n\nList {}: {}.", number, fmt::join(list, " "));
    task.items.push_back({fmt::format("\n\nQuestion: Which word occurs most often in list {0}?\n"
                                      "Answer: The word that occurs most often in list {0} is",
                                      number),
                          pool[0]});
  }
  return task;
}

}  // namespace

const Strings& TaskNames() {
  static const Strings names = {"passcode", "multikey", "variables", "words"};
  return names;
}

std::vector<Task> MakeTasks(const Strings& names, const std::string& prose, int words,
                            int questions, uint32_t seed) {
  std::vector<Task> tasks;
  if (questions == 0) return tasks;
  const size_t present = Split(prose).size();
  const Strings sentences = Sentences(prose, words);
  // In one order and each once, however they were named.
  for (const auto& name : TaskNames()) {
    if (std::find(names.begin(), names.end(), name) == names.end()) continue;
    if (name != "words" && present < size_t(words)) {
      throw Error(kUsage, fmt::format("--task-words: {} words are wanted, the text has {}", words,
                                      present));
    }
    std::mt19937 random(seed);  // a task does not depend on which others are asked for
    Task task = name == "passcode"    ? Passcodes(sentences, questions, &random)
                : name == "multikey"  ? MultiKey(sentences, questions, &random)
                : name == "variables" ? Variables(sentences, questions, &random)
                                      : Words(words, questions, &random);
    task.name = name;
    tasks.push_back(std::move(task));
  }
  return tasks;
}

std::string QuestionFirst(const std::string& text, const std::string& question) {
  const size_t start = question.find_first_not_of('\n');
  return question.substr(start, question.find("\nAnswer:") - start) + "\n\n" + text;
}

bool IsRight(const std::string& answer, const std::string& expected) {
  const bool number = isdigit(static_cast<unsigned char>(expected[0]));
  const auto counts = [&](unsigned char c) { return number ? isdigit(c) : isalpha(c); };
  const auto first = std::find_if(answer.begin(), answer.end(), counts);
  std::string found(first, std::find_if_not(first, answer.end(), counts));
  for (char& c : found) c = static_cast<char>(tolower(static_cast<unsigned char>(c)));
  return found == expected;
}

}  // namespace sparkv

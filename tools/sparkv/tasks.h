// Retrieval tasks in the style of RULER, made from a seed. Each is one text and questions about it:
// where the text is read and packed first and the questions come one by one afterwards, nothing
// that prunes can know what will be asked.
#ifndef SPARKV_TOOLS_TASKS_H_
#define SPARKV_TOOLS_TASKS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sparkv {

struct Task {
  struct Item {
    std::string question;  // continues the text; the answer is what the model writes next
    std::string expected;  // a number or a word in small letters
  };
  std::string name;
  std::string text;
  std::vector<Item> items;
};

//   passcode   passcodes of places, spread over prose
//   multikey   the same with four keys for each one asked, made of the same few words
//   variables  VAR A = 12345, later VAR B = VAR A, later VAR C = VAR B: the value of VAR C
//   words      lists of words, the word that occurs most often in each
const std::vector<std::string>& TaskNames();

// Tasks of about `words` words with `questions` questions each, the same everywhere for the same
// seed. Throws Error(kUsage) where `prose` or `words` is too short for them.
std::vector<Task> MakeTasks(const std::vector<std::string>& names, const std::string& prose,
                            int words, int questions, uint32_t seed);

// The text behind the question (not its beginning of an answer), for caches that choose what to
// keep by what is asked; the question then follows the text as ever.
std::string QuestionFirst(const std::string& text, const std::string& question);

// Whether an answer begins with what is expected: its first run of digits (of letters, where a word
// is expected) is exactly that.
bool IsRight(const std::string& answer, const std::string& expected);

}  // namespace sparkv

#endif

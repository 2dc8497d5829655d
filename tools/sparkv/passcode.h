// Passcodes hidden in prose. The text is read and packed first; the questions come afterwards, so
// nothing that prunes can know what will be asked.
#ifndef SPARKV_TOOLS_PASSCODE_H_
#define SPARKV_TOOLS_PASSCODE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sparkv {

struct Passcodes {
  struct Item {
    std::string question;  // continues the text; the answer is what the model writes next
    std::string code;
  };
  std::string text;
  std::vector<Item> items;
};

// `count` passcodes spread over the first `words` words of `prose`, the same for the same seed.
Passcodes HidePasscodes(const std::string& prose, int words, int count, uint32_t seed);
// Whether an answer gives the code: its first digits are the code.
bool AnswersCode(const std::string& answer, const std::string& code);

}  // namespace sparkv

#endif

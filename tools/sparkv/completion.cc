#include "completion.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <vector>

namespace sparkv {
namespace {

std::vector<std::string> LongNames(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const auto& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::vector<std::string> Commands(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  return names;
}

// What an option takes: the words of a type name "a|b|c", or none when it is not such a list.
std::string Values(const CLI::Option& option) {
  std::string values = option.get_type_name();
  values.resize(std::min(values.size(), values.find(":{")));  // a check says its words once more
  if (values.find('|') == std::string::npos) return "";
  std::replace(values.begin(), values.end(), '|', ' ');
  return values;
}

// zsh reads the same script through bashcompinit. Where it offers nothing, the shell offers files.
std::string Bash(const CLI::App& app) {
  std::map<std::string, std::string> values;  // by option: one name means the same everywhere
  std::string options;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    options += fmt::format("        {}) words=\"{}\" ;;\n", command->get_name(),
                           fmt::join(LongNames(*command), " "));
    for (const CLI::Option* option : command->get_options()) {
      if (const std::string words = Values(*option); !words.empty())
        values["--" + option->get_lnames()[0]] = words;
    }
  }
  std::string cases;
  for (const auto& [name, words] : values)
    cases += fmt::format("    {}) words=\"{}\" ;;\n", name, words);
  return fmt::format(
      "_sparkv() {{\n"
      "  local words= word=\"${{COMP_WORDS[COMP_CWORD]}}\"\n"
      "  case \"${{COMP_WORDS[COMP_CWORD-1]}}\" in\n{}"
      "    *) if [ \"$COMP_CWORD\" = 1 ]; then words=\"{} {}\"\n"
      "      elif [ \"${{word#-}}\" != \"$word\" ]; then case \"${{COMP_WORDS[1]}}\" in\n{}"
      "      esac; fi ;;\n"
      "  esac\n"
      "  COMPREPLY=($(compgen -W \"$words\" -- \"$word\"))\n"
      "}}\n"
      "complete -o default -F _sparkv sparkv\n",
      cases, fmt::join(Commands(app), " "), fmt::join(LongNames(app), " "), options);
}

std::string Quote(const std::string& text) {
  std::string out(1, '\'');
  for (char c : text) {
    if (c == '\'' || c == '\\') out.push_back('\\');
    out.push_back(c);
  }
  out.push_back('\'');
  return out;
}

std::string Fish(const CLI::App& app) {
  std::string out;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    out += fmt::format("complete -c sparkv -n __fish_use_subcommand -f -a {} -d {}\n",
                       command->get_name(), Quote(command->get_description()));
    for (const CLI::Option* option : command->get_options()) {
      for (const auto& name : option->get_lnames()) {
        out += fmt::format("complete -c sparkv -n '__fish_seen_subcommand_from {}' -l {} -d {}",
                           command->get_name(), name, Quote(option->get_description()));
        const std::string values = Values(*option);
        out += values.empty() ? "\n" : fmt::format(" -x -a {}\n", Quote(values));
      }
    }
  }
  for (const auto& name : LongNames(app))
    out += fmt::format("complete -c sparkv -n __fish_use_subcommand -l {}\n", name.substr(2));
  return out;
}

}  // namespace

std::string CompletionScript(const CLI::App& app, const std::string& shell) {
  if (shell == "fish") return Fish(app);
  return (shell == "zsh" ? "autoload -Uz bashcompinit && bashcompinit\n" : "") + Bash(app);
}

}  // namespace sparkv

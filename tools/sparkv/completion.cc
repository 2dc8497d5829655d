#include "completion.h"

#include <fmt/format.h>

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

// One case per sub-command, in the syntax that bash and zsh share.
std::string Cases(const CLI::App& app, const char* body) {
  std::string out;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    out += fmt::format("    {}) {}\"{}\" ;;\n", command->get_name(), body,
                       fmt::join(LongNames(*command), " "));
  }
  return out;
}

std::string Commands(const CLI::App& app) {
  std::string out;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    out += (out.empty() ? "" : " ") + command->get_name();
  }
  return out;
}

std::string Bash(const CLI::App& app) {
  return fmt::format(
      "_sparkv() {{\n"
      "  local words\n"
      "  case \"${{COMP_WORDS[1]}}\" in\n{}"
      "    *) words=\"{} {}\" ;;\n"
      "  esac\n"
      "  COMPREPLY=($(compgen -W \"$words\" -- \"${{COMP_WORDS[COMP_CWORD]}}\"))\n"
      "}}\n"
      "complete -o default -F _sparkv sparkv\n",
      Cases(app, "words="), Commands(app), fmt::join(LongNames(app), " "));
}

std::string Zsh(const CLI::App& app) {
  return fmt::format(
      "#compdef sparkv\n"
      "_sparkv() {{\n"
      "  local words_of\n"
      "  case \"$words[2]\" in\n{}"
      "    *) words_of=\"{} {}\" ;;\n"
      "  esac\n"
      "  compadd -- ${{=words_of}}\n"
      "  _files\n"
      "}}\n"
      "compdef _sparkv sparkv\n",
      Cases(app, "words_of="), Commands(app), fmt::join(LongNames(app), " "));
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
        out += fmt::format("complete -c sparkv -n '__fish_seen_subcommand_from {}' -l {} -d {}\n",
                           command->get_name(), name, Quote(option->get_description()));
      }
    }
  }
  for (const auto& name : LongNames(app))
    out += fmt::format("complete -c sparkv -n __fish_use_subcommand -l {}\n", name.substr(2));
  return out;
}

}  // namespace

std::string CompletionScript(const CLI::App& app, const std::string& shell) {
  return shell == "bash" ? Bash(app) : shell == "zsh" ? Zsh(app) : Fish(app);
}

}  // namespace sparkv

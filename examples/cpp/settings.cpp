// c10/util/Flags.h, which LibTorch carries, is not used: it reads "12x" as 12 and "abc" as 0, lists
// its own flags in --help, and answers an unknown flag with a log.
#include "settings.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <system_error>

#include "errors.h"
#include "model.h"

namespace {

int64_t parse_number(const Option& option, const std::string& text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  const bool is_number = result.ec == std::errc() && result.ptr == end;
  if (!is_number || value < option.low || value > option.high) {
    throw InputError(std::string(option.name) + " must be a whole number from " +
                     std::to_string(option.low) + " to " + std::to_string(option.high) + ", got " +
                     (text.empty() ? "nothing" : text));
  }
  return value;
}

void check_together(const Settings& settings) {
  if (settings.files.empty()) {
    throw InputError("FILE must be at least one file of text, got none (--help explains)");
  }
  if (settings.hidden_size % kHeadSize != 0) {
    throw InputError("--hidden-size must be a multiple of " + std::to_string(kHeadSize) + ", got " +
                     std::to_string(settings.hidden_size));
  }
  if (settings.top_k > settings.experts) {
    throw InputError("--top-k must be at most --experts, which is " +
                     std::to_string(settings.experts) + ", got " + std::to_string(settings.top_k));
  }
  if (settings.batch_tokens < settings.context) {
    throw InputError("--batch-tokens must be at least --context, which is " +
                     std::to_string(settings.context) + ", got " +
                     std::to_string(settings.batch_tokens));
  }
}

}  // namespace

const std::vector<Option>& options() {
  static const std::vector<Option> table = {
      {"--steps", &Settings::steps, 1, 100'000'000, true, "optimizer steps"},
      {"--every", &Settings::every, 1, 100'000'000, true, "steps from one checkpoint to the next"},
      {"--seed", &Settings::seed, 0, 1'000'000'000, true, "same seed, same run"},
      // The rounding of torch's products may follow the threads, and no other number does.
      {"--threads", &Settings::threads, 0, 1024, false, "CPU threads, 0 for all cores"},
      {"--layers", &Settings::layers, 1, 256, true, "transformer blocks"},
      {"--hidden-size", &Settings::hidden_size, 32, 65'536, true, "width, a multiple of 32"},
      {"--intermediate-size",
       &Settings::intermediate_size,
       1,
       1'048'576,
       true,
       "inner width of an expert"},
      {"--experts", &Settings::experts, 1, 4096, true, "experts in each layer"},
      {"--top-k", &Settings::top_k, 1, 4096, true, "experts that each byte visits"},
      {"--context", &Settings::context, 2, 65'536, true, "bytes that the model looks back"},
      {"--batch-tokens", &Settings::batch_tokens, 2, 16'777'216, true, "bytes in each step"},
  };
  return table;
}

std::string usage() {
  const Settings defaults;
  std::string text =
      "usage: train_lm [OPTION N]... FILE...\n\n"
      "Trains a byte-level language model with mixture-of-experts layers on the\n"
      "files, in their order. Ctrl-C stops it; the same command goes on.\n\n";
  const auto add = [&text](const char* name, const char* help, const std::string& value) {
    char line[128];
    std::snprintf(line, sizeof line, "  %-20s %s (%s)\n", name, help, value.c_str());
    text += line;
  };
  add("--out", "folder of the checkpoint", defaults.out);
  for (const auto& option : options()) {
    add(option.name, option.help, std::to_string(defaults.*option.value));
  }
  return text;
}

Settings parse_arguments(const std::vector<std::string>& arguments) {
  Settings settings;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = arguments[i];
    if (argument.empty() || argument[0] != '-') {
      settings.files.push_back(argument);
      continue;
    }
    const auto equals = argument.find('=');
    const auto name = argument.substr(0, equals);
    const auto option = std::find_if(
        options().begin(), options().end(), [&](const Option& o) { return name == o.name; });
    if (name != "--out" && option == options().end()) {
      throw InputError("argument must be a file or an option that --help lists, got " + name);
    }
    if (equals == std::string::npos && i + 1 == arguments.size()) {
      throw InputError(name + " must be followed by a value, got nothing");
    }
    const auto value = equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1);
    if (name != "--out") {
      settings.*option->value = parse_number(*option, value);
    } else if (value.empty()) {
      throw InputError("--out must be a folder, got nothing");
    } else {
      settings.out = value;
    }
  }
  check_together(settings);
  return settings;
}

// The command line: every number of a run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Settings {
  std::vector<std::string> files;  // the text
  std::string out = "runs/cpp_lm";
  int64_t steps = 1600;
  int64_t every = 100;
  int64_t seed = 0;
  int64_t threads = 1;  // more of them wait long for each other where other programs run
  int64_t layers = 4;
  int64_t hidden_size = 128;
  int64_t intermediate_size = 128;
  int64_t experts = 8;
  int64_t top_k = 2;
  int64_t context = 128;
  int64_t batch_tokens = 1024;

  /// Windows of `context` bytes in each step.
  int64_t batch() const { return batch_tokens / context; }
};

/// One number of the command line.
struct Option {
  const char* name;  // as it is written there
  int64_t Settings::*value;
  int64_t low, high;
  bool settled;  // whether it must stay as it is when a run goes on
  const char* help;
};

const std::vector<Option>& options();

/// What --help prints.
std::string usage();

/// Settings from the arguments, without the program's name.
/// \throws InputError at the first that is wrong.
Settings parse_arguments(const std::vector<std::string>& arguments);

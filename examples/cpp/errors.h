// What ends the program in one sentence.
#pragma once

#include <stdexcept>
#include <string>

/// Wrong input: the message says what must be and what was given. The exit status is 2.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The machine refuses: a disk is full, a folder is not writable. The exit status is 1.
struct SystemError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a run prints while it goes.
#pragma once

#include <chrono>
#include <cstdint>

#include "checkpoint.h"
#include "model.h"
#include "settings.h"
#include "text.h"

/// The sizes of the text and of the model.
void print_head(const Settings& settings, const Text& text, const ByteLM& model);

/// A table whose lines come one by one.
class Report {
 public:
  /// Prints its head, where there are steps to come after `first_step`.
  Report(const Settings& settings, int64_t first_step);

  /// Around each optimizer step; what lies between two is not part of its speed.
  void begin_step();
  void end_step();

  /// The line after step `progress.step`, with the speed of the steps since the line before.
  void print(const Progress& progress, double valid);

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds_since(Clock::time_point begin);

  Settings settings_;
  int64_t first_step_;
  Clock::time_point begin_ = Clock::now(), step_begin_;
  double seconds_ = 0;  // of the steps since the last line
  int64_t steps_ = 0;
};

#include "report.h"

#include <cmath>
#include <cstdio>
#include <string>

namespace {

/// 1234567 as 1,234,567.
std::string with_commas(int64_t number) {
  auto digits = std::to_string(number);
  for (auto place = static_cast<int64_t>(digits.size()) - 3; place > 0; place -= 3) {
    digits.insert(static_cast<size_t>(place), 1, ',');
  }
  return digits;
}

/// Minutes and seconds, with hours where there are any.
std::string clock(double seconds) {
  const auto whole = std::llround(seconds);
  char text[32];
  if (whole < 3600) {
    std::snprintf(text, sizeof text, "%lld:%02lld", whole / 60, whole % 60);
  } else {
    std::snprintf(
        text, sizeof text, "%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return text;
}

}  // namespace

void print_head(const Settings& settings, const Text& text, const ByteLM& model) {
  int64_t parameters = 0;
  for (const auto& parameter : model->parameters()) {
    parameters += parameter.numel();
  }
  std::printf("text        %s bytes to train on, %s for validation\n",
              with_commas(text.train.numel()).c_str(),
              with_commas(text.validation.numel()).c_str());
  std::printf("model       %s parameters, %d layers, %d of %d experts\n",
              with_commas(parameters).c_str(),
              static_cast<int>(settings.layers),
              static_cast<int>(settings.top_k),
              static_cast<int>(settings.experts));
  std::fflush(stdout);
}

Report::Report(const Settings& settings, int64_t first_step)
    : settings_(settings), first_step_(first_step) {
  if (first_step < settings.steps) {
    std::printf("\n        bits per byte\n  step   train   valid  tokens/s   left\n");
  }
  std::fflush(stdout);
}

void Report::begin_step() {
  step_begin_ = Clock::now();
}

void Report::end_step() {
  seconds_ += seconds_since(step_begin_);
  ++steps_;
}

void Report::print(const Progress& progress, double valid) {
  const auto tokens = static_cast<double>(steps_ * settings_.batch() * settings_.context);
  const auto done = static_cast<double>(progress.step - first_step_);
  const auto to_do = static_cast<double>(settings_.steps - progress.step);
  std::printf("%6lld  %6.4f  %6.4f  %8s  %5s\n",
              static_cast<long long>(progress.step),
              progress.bits / static_cast<double>(progress.count),
              valid,
              with_commas(std::llround(tokens / seconds_)).c_str(),
              clock(seconds_since(begin_) / done * to_do).c_str());
  std::fflush(stdout);
  seconds_ = 0;
  steps_ = 0;
}

double Report::seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

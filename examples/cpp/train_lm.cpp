// A byte-level language model with mixture-of-experts layers, trained from C++ alone: LibTorch and
// torchmoe, no Python. Build it and train it on the text of this repository, a few minutes:
//
//   torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
//   torchmoe=$(python -c 'import torchmoe; print(torchmoe.cmake_prefix_path)')
//   prefix="-DCMAKE_PREFIX_PATH=$torch;$torchmoe"
//   cmake -S examples/cpp -B build/example -DCMAKE_BUILD_TYPE=Release "$prefix"
//   cmake --build build/example
//   build/example/train_lm csrc/*/*.h csrc/*/*.cpp python/torchmoe/*.py python/torchmoe/*/*.py
//
// Ctrl-C stops it, and the same command goes on from there, to the same numbers as if it had never
// stopped. --help lists what can be set.
//
//   text.h           bytes of files, and which are held out for validation
//   model.h          the transformer, a torchmoe layer in each block
//   training.h       one step; the loss on the validation windows
//   checkpoint.h     what a run needs to go on, in one file
//   expert_table.h   each expert's share of the bytes
//   report.h         the lines of a run
//   interrupt.h      Ctrl-C
//   settings.h       the command line
//   train_lm.cpp     the run
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include <c10/util/Exception.h>
#include <torch/utils.h>

#include "checkpoint.h"
#include "errors.h"
#include "expert_table.h"
#include "interrupt.h"
#include "model.h"
#include "report.h"
#include "settings.h"
#include "text.h"
#include "training.h"

namespace {

constexpr int64_t kValidationWindows = 256;
constexpr int kStopped = 130;  // what a shell reports of a program that Ctrl-C ended

/// The run from its checkpoint, or from nothing, to its end or to Ctrl-C; gives the exit status.
int run(const Settings& settings) {
  if (settings.threads > 0) {
    torch::set_num_threads(static_cast<int>(settings.threads));
  }
  const auto text = Text::read(settings.files, settings.context);
  const auto windows = text.validation_windows(kValidationWindows, settings.context);
  torch::manual_seed(settings.seed);
  ByteLM model(settings);
  auto optimizer = make_optimizer(model);
  const Checkpoint checkpoint(settings, text.hash);
  Progress progress;
  const bool goes_on = checkpoint.load(model, optimizer, progress);

  print_head(settings, text, model);
  if (goes_on) {
    std::printf("checkpoint  %s, step %lld of %lld\n",
                checkpoint.path().c_str(),
                static_cast<long long>(progress.step),
                static_cast<long long>(settings.steps));
  } else {
    checkpoint.save(model, optimizer, progress);  // says now, not in an hour, if it cannot
    std::printf("checkpoint  %s\n", checkpoint.path().c_str());
  }

  catch_interrupt();
  Report report(settings, progress.step);
  std::optional<Validation> validation;
  while (progress.step < settings.steps && !was_interrupted()) {
    report.begin_step();
    ++progress.step;
    progress.bits += train_step(model, optimizer, text, settings, progress.step);
    ++progress.count;
    report.end_step();
    if (progress.step % settings.every == 0 || progress.step == settings.steps) {
      validation = validate(model, windows, settings.batch());
      report.print(progress, validation->bits_per_byte);
      progress.bits = 0;
      progress.count = 0;
      checkpoint.save(model, optimizer, progress);
    }
  }
  if (progress.count > 0) {  // stopped between two lines: a last one for the steps since
    checkpoint.save(model, optimizer, progress);
    validation = validate(model, windows, settings.batch());
    report.print(progress, validation->bits_per_byte);
  }
  if (!validation) {  // there was nothing left to do
    validation = validate(model, windows, settings.batch());
  }

  print_expert_table(validation->tokens_per_expert);
  if (progress.step < settings.steps) {
    std::printf("\nstopped after step %lld of %lld; the same command goes on from there\n",
                static_cast<long long>(progress.step),
                static_cast<long long>(settings.steps));
    return kStopped;
  }
  std::printf("\nvalidation: %.4f bits per byte after %lld steps\n",
              validation->bits_per_byte,
              static_cast<long long>(settings.steps));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::printf("%s", usage().c_str());
    return 0;
  }
  try {
    return run(parse_arguments(arguments));
  } catch (const InputError& error) {
    std::fprintf(stderr, "train_lm: %s\n", error.what());
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "train_lm: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_lm: %s\n", error.what());
  }
  return 1;
}

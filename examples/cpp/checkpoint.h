// The checkpoint: one file with all that a run needs to go on.
//
// That is the weights, the optimizer's state, how far the run is, its settings and a hash of its
// text. The first line says what the file is and has a hash of the rest, which is what
// torch::serialize writes.
#pragma once

#include <cstdint>
#include <filesystem>

#include <torch/optim/adamw.h>

#include "model.h"
#include "settings.h"

/// How far a run is.
struct Progress {
  int64_t step = 0;
  double bits = 0;    // sum of the training losses since the last full line of the report
  int64_t count = 0;  // of those
};

class Checkpoint {
 public:
  /// The checkpoint in the folder `settings.out` of a run with these settings and this text.
  Checkpoint(const Settings& settings, int64_t text_hash);

  const std::filesystem::path& path() const { return path_; }

  /// Writes a new file next to the old one and then takes its name, so that at any moment there is
  /// a whole one.
  /// \throws SystemError where it cannot be written; the old one is still there.
  void save(const ByteLM& model,
            const torch::optim::AdamW& optimizer,
            const Progress& progress) const;

  /// Puts what was saved into the model and the optimizer; false, and nothing, where there is none.
  /// \throws InputError where it is damaged or of another run. It stays as it is.
  bool load(ByteLM& model, torch::optim::AdamW& optimizer, Progress& progress) const;

 private:
  Settings settings_;
  int64_t text_hash_;
  std::filesystem::path path_;
};

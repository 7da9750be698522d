// One optimizer step, and the measure of how well the model predicts what it has not seen.
#pragma once

#include <cstdint>

#include <torch/optim/adamw.h>

#include "model.h"
#include "settings.h"
#include "text.h"

torch::optim::AdamW make_optimizer(ByteLM& model);

/// Step `step`, counted from 1, on a batch that follows from the seed and `step` alone: a run that
/// goes on after a stop draws what it would have drawn, and no generator has to be saved.
/// \returns the batch's loss in bits per byte, before the step.
double train_step(ByteLM& model,
                  torch::optim::AdamW& optimizer,
                  const Text& text,
                  const Settings& settings,
                  int64_t step);

struct Validation {
  double bits_per_byte;
  at::Tensor tokens_per_expert;  // int64 [L, E]
};

/// windows int64 [W, S + 1]: each byte but the first is predicted from those before it.
Validation validate(ByteLM& model, const at::Tensor& windows, int64_t batch);

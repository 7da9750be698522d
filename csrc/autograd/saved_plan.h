// A dispatch plan among the tensors that a Function saves.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "ops/dispatch_plan.h"

namespace torchmoe {

/// The plan saved as the three tensors from `first` on.
inline DispatchPlan saved_plan(const torch::autograd::variable_list& saved, size_t first) {
  return {saved[first], saved[first + 1], saved[first + 2]};
}

}  // namespace torchmoe

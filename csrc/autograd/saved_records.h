// Records among the tensors that a Function saves.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "common/tensors.h"
#include "ops/dispatch_plan.h"
#include "ops/expert_parameters.h"

namespace torchmoe {

/// The plan saved as the three tensors from `first` on.
inline DispatchPlan saved_plan(const torch::autograd::variable_list& saved, size_t first) {
  return {saved[first], saved[first + 1], saved[first + 2]};
}

/// The parameters saved as the four tensors from `first` on; an absent bias is undefined there.
inline ExpertParameters saved_experts(const torch::autograd::variable_list& saved, size_t first) {
  return {
      saved[first], if_defined(saved[first + 1]), saved[first + 2], if_defined(saved[first + 3])};
}

}  // namespace torchmoe

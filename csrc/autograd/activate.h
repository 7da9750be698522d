// The experts' activations as compositions of torch's ops, for the derivatives that no kernel forms.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/expert_activation.h"

namespace torchmoe {

/// The activation of pre-activations [N, P] -> [N, I], computed wide and rounded once,
/// differentiable any number of times in every mode.
at::Tensor activate(const at::Tensor& pre, const ExpertActivation& activation);

}  // namespace torchmoe

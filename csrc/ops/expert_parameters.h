#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "expert_activation.h"

namespace torchmoe {

/// The matrices and biases of all experts: w_in [E, P, H], b_in [E, P], w_out [E, H, I], b_out [E,
/// H], of one floating dtype. P is the width of the pre-activation: I for a plain activation; 2I for
/// a gated one, whose first I rows of w_in are the gates, or every other one, from the first on, if
/// it is interleaved.
struct ExpertParameters {
  at::Tensor w_in;
  std::optional<at::Tensor> b_in;
  at::Tensor w_out;
  std::optional<at::Tensor> b_out;

  auto fields() const { return std::tie(w_in, b_in, w_out, b_out); }
};

/// Checks the experts' parameters against their tokens, which the op calls `x_name`; every op that
/// runs experts calls it.
void check_expert_parameters(std::string_view op,
                             std::string_view x_name,
                             const at::Tensor& x,
                             const ExpertParameters& experts,
                             const ExpertActivation& activation);

}  // namespace torchmoe

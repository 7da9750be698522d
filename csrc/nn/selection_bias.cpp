#include "nn/selection_bias.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/sign.h>

#include "common/checks.h"
#include "nn/detail/checks.h"

namespace torchmoe {

at::Tensor update_selection_bias(const at::Tensor& bias,
                                 const at::Tensor& tokens_per_expert,
                                 double rate,
                                 bool centred) {
  constexpr auto op = "update_selection_bias";
  nn::check_not_negative(op, "rate", rate);
  check_defined(op, "bias", bias);
  TORCH_CHECK(bias.dim() == 1 && bias.is_floating_point(),
              op,
              ": bias must be [num_experts] and floating, got ",
              bias.scalar_type(),
              " of shape ",
              bias.sizes());
  nn::check_counts(op, "tokens_per_expert", tokens_per_expert, bias.size(0), bias.device());
  const auto counts = tokens_per_expert.to(at::kDouble);
  auto move = at::sign(counts.mean() - counts);
  if (centred) {
    move = move - move.mean();
  }
  return (bias.to(at::kDouble) + rate * move).to(bias.scalar_type());
}

}  // namespace torchmoe

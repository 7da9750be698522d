#include "ops/router_z_loss.h"

#include <ATen/ops/logsumexp.h>
#include <ATen/ops/square.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "autograd/composed.h"
#include "common/dtypes.h"
#include "ops/mean_over_tokens.h"

namespace torchmoe {

namespace {

at::Tensor compose_router_z_loss(const at::Tensor& logits,
                                 const std::optional<at::Tensor>& token_mask) {
  const auto wide = logits.to(accumulate_dtype(logits.scalar_type()));
  const auto counted = token_mask ? at::where(token_mask->unsqueeze(-1), wide, 0.0) : wide;
  const auto squares = at::square(at::logsumexp(counted, -1));
  const auto mask = token_mask ? std::optional(token_mask->reshape(-1)) : std::nullopt;
  return mean_over_tokens(squares.reshape({-1, 1}), mask).squeeze(0);
}

struct RouterZLoss {
  static constexpr auto kName = "router_z_loss";
  static constexpr auto out = &router_z_loss;
  static constexpr auto gradient = &router_z_loss_backward;
  static constexpr auto check = &check_router_z_loss;
  static constexpr auto check_gradient = &check_router_z_loss_backward;
  static constexpr auto composition = &compose_router_z_loss;
};

using RouterZLossDerivatives = Composed<RouterZLoss, const std::optional<at::Tensor>&>;

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("router_z_loss", &RouterZLossDerivatives::out);
  m.impl("_router_z_loss_backward", &RouterZLossDerivatives::gradient);
}

}  // namespace torchmoe

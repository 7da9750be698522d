#include "ops/router_z_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/once_differentiable.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class RouterZLoss : public torch::autograd::Function<RouterZLoss> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& logits,
                            const std::optional<at::Tensor>& token_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{logits};
    if (token_mask) {
      saved.push_back(*token_mask);
    }
    ctx->save_for_backward(std::move(saved));
    return router_z_loss(logits, token_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto token_mask = saved.size() == 2 ? std::optional(saved[1]) : std::nullopt;
    return {router_z_loss_backward(grads[0], saved[0], token_mask), at::Tensor()};
  }
};

at::Tensor router_z_loss_autograd(const at::Tensor& logits,
                                  const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(logits, token_mask);
  refuse_tangents("router_z_loss", logits);
  return RouterZLoss::apply(logits, token_mask);
}

at::Tensor router_z_loss_backward_autograd(const at::Tensor& grad,
                                           const at::Tensor& logits,
                                           const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad, logits, token_mask);
  refuse_tangents("router_z_loss", grad, logits);
  const variable_list inputs{grad, logits};
  return OnceDifferentiable::apply(
      at::TensorList(inputs),
      [&] { return variable_list{router_z_loss_backward(grad, logits, token_mask)}; },
      "router_z_loss: double backward must not be requested, got a gradient of the gradient; use "
      "logits.logsumexp(-1).square().mean() where a second derivative is needed")[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("router_z_loss", &router_z_loss_autograd);
  m.impl("_router_z_loss_backward", &router_z_loss_backward_autograd);
}

}  // namespace torchmoe

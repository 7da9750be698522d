#include "ops/load_balancing_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/once_differentiable.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LoadBalancingLoss : public torch::autograd::Function<LoadBalancingLoss> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& logits,
                            const at::Tensor& fraction,
                            std::string_view score_function,
                            const std::optional<at::Tensor>& token_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{logits, fraction};
    if (token_mask) {
      saved.push_back(*token_mask);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["score_function"] = std::string(score_function);
    return load_balancing_loss(logits, fraction, score_function, token_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto token_mask = saved.size() == 3 ? std::optional(saved[2]) : std::nullopt;
    return {load_balancing_loss_backward(grads[0],
                                         saved[0],
                                         saved[1],
                                         ctx->saved_data["score_function"].toStringRef(),
                                         token_mask),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor load_balancing_loss_autograd(const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss(logits, fraction, score_function, token_mask);
  refuse_tangents("load_balancing_loss", logits, fraction);
  return LoadBalancingLoss::apply(logits, fraction, score_function, token_mask);
}

at::Tensor load_balancing_loss_backward_autograd(const at::Tensor& grad,
                                                 const at::Tensor& logits,
                                                 const at::Tensor& fraction,
                                                 std::string_view score_function,
                                                 const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad, logits, fraction, score_function, token_mask);
  refuse_tangents("load_balancing_loss", grad, logits, fraction);
  const variable_list inputs{grad, logits};
  return OnceDifferentiable::apply(
      at::TensorList(inputs),
      [&] {
        return variable_list{
            load_balancing_loss_backward(grad, logits, fraction, score_function, token_mask)};
      },
      "load_balancing_loss: double backward must not be requested, got a gradient of the gradient; "
      "compose the loss from torch's own ops where a second derivative is needed")[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("load_balancing_loss", &load_balancing_loss_autograd);
  m.impl("_load_balancing_loss_backward", &load_balancing_loss_backward_autograd);
}

}  // namespace torchmoe

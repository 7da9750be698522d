// logits = x W^T + b is linear in each of x, W and b, so that its derivatives of every order are
// the op and its backward again.
#include "ops/router_logits.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/needed_gradients.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class RouterLogitsBackward : public torch::autograd::Function<RouterLogitsBackward> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& grad,
                               const at::Tensor& x,
                               const at::Tensor& weight,
                               std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, x, weight});
    ctx->saved_data["output_mask"] =
        c10::List<bool>({output_mask[0], output_mask[1], output_mask[2]});
    auto [grad_x, grad_weight, grad_bias] = router_logits_backward(grad, x, weight, output_mask);
    return {grad_x, grad_weight, grad_bias};
  }

  // With v, V, c the gradients arriving at grad_x = G W, grad_weight = G^T x and grad_bias = 1^T G:
  // dG = v W^T + x V^T + c, dx = G V, dW = G^T v.
  static variable_list backward(AutogradContext* ctx, const variable_list& arriving) {
    const auto saved = ctx->get_saved_variables();
    const auto &grad = saved[0], &x = saved[1], &weight = saved[2];
    const auto given = ctx->saved_data["output_mask"].toBoolList();
    NeededGradients needed(ctx);
    at::Tensor grad_grad, grad_x, grad_weight;
    const auto add = [&](const at::Tensor& term) {
      grad_grad = grad_grad.defined() ? at::add(grad_grad, term) : term;
    };
    if (needed.next()) {
      if (given[0]) {
        add(router_logits(arriving[0], weight, std::nullopt));
      }
      if (given[1]) {
        add(router_logits(x, arriving[1], std::nullopt));
      }
      if (given[2]) {
        add(arriving[2].to(grad.scalar_type()).expand_as(grad));
      }
    }
    if (needed.next() && given[1]) {
      grad_x = std::get<0>(router_logits_backward(grad, x, arriving[1], {true, false, false}));
    }
    if (needed.next() && given[0]) {
      grad_weight =
          std::get<1>(router_logits_backward(grad, arriving[0], weight, {false, true, false}));
    }
    return {grad_grad, grad_x, grad_weight, at::Tensor()};
  }
};

class RouterLogits : public torch::autograd::Function<RouterLogits> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& x,
                            const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    return router_logits(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    NeededGradients needed(ctx);
    std::array<bool, 3> mask{};
    mask[0] = needed.next();
    mask[1] = needed.next();
    mask[2] = needed.next(ctx->saved_data["has_bias"].toBool());
    auto [grad_x, grad_weight, grad_bias] =
        router_logits_backward(grads[0], saved[0], saved[1], mask);
    return {gradient_if(mask[0], grad_x),
            gradient_if(mask[1], grad_weight),
            gradient_if(mask[2], grad_bias)};
  }
};

at::Tensor router_logits_autograd(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias) {
  check_router_logits(x, weight, bias);
  refuse_tangents("router_logits", x, weight, bias);
  return RouterLogits::apply(x, weight, bias);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward_autograd(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad, x, weight);
  refuse_tangents("router_logits", grad, x, weight);
  const auto grads = RouterLogitsBackward::apply(grad, x, weight, output_mask);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("router_logits", &router_logits_autograd);
  m.impl("_router_logits_backward", &router_logits_backward_autograd);
}

}  // namespace torchmoe

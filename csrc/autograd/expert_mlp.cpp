#include "ops/expert_mlp.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/needed_gradients.h"
#include "autograd/once_differentiable.h"
#include "autograd/saved_records.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ExpertMlp : public torch::autograd::Function<ExpertMlp> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& x,
                            const at::Tensor& indices,
                            const at::Tensor& weights,
                            const at::Tensor& w_in,
                            const std::optional<at::Tensor>& b_in,
                            const at::Tensor& w_out,
                            const std::optional<at::Tensor>& b_out,
                            std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto plan = dispatch_plan(indices, w_in.sym_size(0));
    const ExpertParameters experts{w_in, b_in, w_out, b_out};
    auto [y, pre] = expert_mlp_forward(x, weights, experts, plan, activation, /*save_pre=*/true);
    ctx->save_for_backward({x,
                            weights,
                            w_in,
                            b_in.value_or(at::Tensor()),
                            w_out,
                            b_out.value_or(at::Tensor()),
                            plan.expert_offsets,
                            plan.row_to_slot,
                            plan.slot_to_row,
                            pre});
    ctx->saved_data["activation"] = std::string(activation);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto experts = saved_experts(saved, 2);
    NeededGradients needed(ctx);
    std::array<bool, 6> mask{};
    mask[0] = needed.next();  // x
    needed.next();            // indices
    mask[1] = needed.next();  // weights
    mask[2] = needed.next();  // w_in
    mask[3] = needed.next(experts.b_in.has_value());
    mask[4] = needed.next();  // w_out
    mask[5] = needed.next(experts.b_out.has_value());
    const auto [grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out] =
        expert_mlp_backward(grads[0],
                            saved[0],
                            saved[1],
                            experts,
                            saved_plan(saved, 6),
                            saved[9],
                            ctx->saved_data["activation"].toStringRef(),
                            mask);
    return {gradient_if(mask[0], grad_x),
            at::Tensor(),
            gradient_if(mask[1], grad_weights),
            gradient_if(mask[2], grad_w_in),
            gradient_if(mask[3], grad_b_in),
            gradient_if(mask[4], grad_w_out),
            gradient_if(mask[5], grad_b_out),
            at::Tensor()};
  }
};

at::Tensor expert_mlp_autograd(const at::Tensor& x,
                               const at::Tensor& indices,
                               const at::Tensor& weights,
                               const ExpertParameters& experts,
                               std::string_view activation) {
  check_expert_mlp(x, indices, weights, experts, activation);
  refuse_tangents("expert_mlp", x, weights, experts);
  const auto wants_gradient = [](const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->requires_grad();
  };
  const bool differentiates = at::GradMode::is_enabled() &&
                              (wants_gradient(x) || wants_gradient(weights) ||
                               wants_gradient(experts.w_in) || wants_gradient(experts.b_in) ||
                               wants_gradient(experts.w_out) || wants_gradient(experts.b_out));
  if (!differentiates) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return expert_mlp(x, indices, weights, experts, activation);
  }
  return ExpertMlp::apply(
      x, indices, weights, experts.w_in, experts.b_in, experts.w_out, experts.b_out, activation);
}

ExpertMlpGradients expert_mlp_backward_autograd(const at::Tensor& grad,
                                                const at::Tensor& x,
                                                const at::Tensor& weights,
                                                const ExpertParameters& experts,
                                                const DispatchPlan& plan,
                                                const at::Tensor& pre,
                                                std::string_view activation,
                                                std::array<bool, 6> output_mask) {
  check_expert_mlp_backward(grad, x, weights, experts, plan, pre, activation);
  refuse_tangents("expert_mlp", grad, x, weights, experts, pre);
  variable_list inputs{grad, x, weights, experts.w_in, experts.w_out, pre};
  for (const auto& bias : {experts.b_in, experts.b_out}) {
    if (bias) {
      inputs.push_back(*bias);
    }
  }
  const auto grads = OnceDifferentiable::apply(
      at::TensorList(inputs),
      [&] {
        const auto [grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out] =
            expert_mlp_backward(grad, x, weights, experts, plan, pre, activation, output_mask);
        return variable_list{grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
      },
      "expert_mlp: double backward must not be requested, got a gradient of the gradient; compose "
      "permute, grouped_linear and unpermute, which support it");
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("expert_mlp", with_records<&expert_mlp_autograd>);
  m.impl("_expert_mlp_backward", with_records<&expert_mlp_backward_autograd>);
}

}  // namespace torchmoe

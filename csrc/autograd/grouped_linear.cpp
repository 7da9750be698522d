// out = rows W^T + b, expert by expert, is linear in each of rows, W and b, so that its derivatives
// of every order are the op and its backward again.
#include "ops/grouped_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/needed_gradients.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class GroupedLinearBackward : public torch::autograd::Function<GroupedLinearBackward> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& grad,
                               const at::Tensor& rows,
                               const at::Tensor& weight,
                               const at::Tensor& expert_offsets,
                               std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, rows, weight, expert_offsets});
    ctx->saved_data["output_mask"] =
        c10::List<bool>({output_mask[0], output_mask[1], output_mask[2]});
    auto [grad_rows, grad_weight, grad_bias] =
        grouped_linear_backward(grad, rows, weight, expert_offsets, output_mask);
    return {grad_rows, grad_weight, grad_bias};
  }

  // With v, V, c the gradients arriving at grad_rows = G W, grad_weight = G^T rows and grad_bias =
  // 1^T G: dG = v W^T + rows V^T + c, drows = G V, dW = G^T v.
  static variable_list backward(AutogradContext* ctx, const variable_list& arriving) {
    const auto saved = ctx->get_saved_variables();
    const auto &grad = saved[0], &rows = saved[1], &weight = saved[2], &expert_offsets = saved[3];
    const auto given = ctx->saved_data["output_mask"].toBoolList();
    NeededGradients needed(ctx);
    at::Tensor grad_grad, grad_rows, grad_weight;
    if (needed.next()) {
      // An absent gradient of the weight stands in as zeros so that the bias alone still goes
      // through the op, which knows which expert a row belongs to.
      const auto weight_grad = given[1] ? arriving[1] : at::zeros_like(weight);
      const auto bias_grad = given[2] ? std::optional(arriving[2]) : std::nullopt;
      grad_grad = grouped_linear(rows, weight_grad, bias_grad, expert_offsets);
      if (given[0]) {
        grad_grad =
            at::add(grad_grad, grouped_linear(arriving[0], weight, std::nullopt, expert_offsets));
      }
    }
    if (needed.next() && given[1]) {
      grad_rows = std::get<0>(
          grouped_linear_backward(grad, rows, arriving[1], expert_offsets, {true, false, false}));
    }
    if (needed.next() && given[0]) {
      grad_weight = std::get<1>(
          grouped_linear_backward(grad, arriving[0], weight, expert_offsets, {false, true, false}));
    }
    return {grad_grad, grad_rows, grad_weight, at::Tensor(), at::Tensor()};
  }
};

class GroupedLinear : public torch::autograd::Function<GroupedLinear> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& rows,
                            const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const at::Tensor& expert_offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, weight, expert_offsets});
    ctx->saved_data["has_bias"] = bias.has_value();
    return grouped_linear(rows, weight, bias, expert_offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    NeededGradients needed(ctx);
    std::array<bool, 3> mask{};
    mask[0] = needed.next();
    mask[1] = needed.next();
    mask[2] = needed.next(ctx->saved_data["has_bias"].toBool());
    auto [grad_rows, grad_weight, grad_bias] =
        grouped_linear_backward(grads[0], saved[0], saved[1], saved[2], mask);
    return {gradient_if(mask[0], grad_rows),
            gradient_if(mask[1], grad_weight),
            gradient_if(mask[2], grad_bias),
            at::Tensor()};
  }
};

at::Tensor grouped_linear_autograd(const at::Tensor& rows,
                                   const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const at::Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, bias, expert_offsets);
  refuse_tangents("grouped_linear", rows, weight, bias);
  return GroupedLinear::apply(rows, weight, bias, expert_offsets);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward_autograd(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad, rows, weight, expert_offsets);
  refuse_tangents("grouped_linear", grad, rows, weight);
  const auto grads = GroupedLinearBackward::apply(grad, rows, weight, expert_offsets, output_mask);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("grouped_linear", &grouped_linear_autograd);
  m.impl("_grouped_linear_backward", &grouped_linear_backward_autograd);
}

}  // namespace torchmoe

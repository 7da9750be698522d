// The result stands for y + sum_i (probs_i - constant) E_i(x), whose value is y: its gradient for
// probs is declared, and that gradient is differentiable by everything in it.
#include "ops/attach_dense_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd/activate.h"
#include "autograd/expert_list.h"
#include "autograd/node.h"
#include "autograd/tangents.h"
#include "autograd/vjp.h"
#include "common/dtypes.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

/// What one expert makes of every token, [T, H] in a wide type.
at::Tensor output_of(const ExpertParameters& experts,
                     int64_t expert,
                     const at::Tensor& x,
                     const ExpertActivation& activation) {
  const auto stored = experts.w_in.scalar_type();
  const auto dtype = accumulate_dtype(stored);
  const auto own = [&](const at::Tensor& all) { return all.select(0, expert).to(dtype); };
  const auto bias = [&](const std::optional<at::Tensor>& all) {
    return all ? std::optional(own(*all)) : std::nullopt;
  };
  const auto pre = at::linear(x.to(stored).to(dtype), own(experts.w_in), bias(experts.b_in));
  return at::linear(activate(pre, activation), own(experts.w_out), bias(experts.b_out));
}

/// The backward op, differentiable any number of times.
at::Tensor compose_dense_gradient(const at::Tensor& grad,
                                  const at::Tensor& x,
                                  const ExpertParameters& experts,
                                  const ExpertActivation& activation) {
  variable_list columns;
  for (int64_t i = 0; i < experts.w_out.size(0); ++i) {
    columns.push_back(at::sum(output_of(experts, i, x, activation) * grad, 1));
  }
  return at::stack(columns, 1);
}

/// sum_i tangent_i E_i(x), what a tangent of probs makes of the result.
at::Tensor mixture_of(const at::Tensor& tangent,
                      const at::Tensor& x,
                      const ExpertParameters& experts,
                      const ExpertActivation& activation) {
  at::Tensor mixture;
  for (int64_t i = 0; i < experts.w_out.size(0); ++i) {
    add_term(mixture, tangent.select(1, i).unsqueeze(1) * output_of(experts, i, x, activation));
  }
  return mixture;
}

variable_list dense_gradient_gradients(const Arriving& arriving,
                                       const at::Tensor& x,
                                       const ExpertParameters& experts,
                                       const ExpertActivation& activation,
                                       at::ScalarType probs_dtype) {
  const auto& grad = arriving.grads[0];
  at::Tensor grad_probs;
  if (arriving.wanted[1]) {
    grad_probs = attach_dense_gradient_backward(grad, x, experts, activation).to(probs_dtype);
  }
  return {grad, grad_probs};
}

at::Tensor attach_dense_gradient_autograd(const at::Tensor& y,
                                          const at::Tensor& probs,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation) {
  check_attach_dense_gradient(y, probs, x, experts, activation);
  const auto copy =
      below_autograd([&] { return attach_dense_gradient(y, probs, x, experts, activation); });
  record_node<&dense_gradient_gradients>("attach_dense_gradient",
                                         {copy},
                                         std::tie(y, probs),
                                         x,
                                         experts,
                                         activation,
                                         probs.scalar_type());
  at::Tensor tangent;
  if (has_tangent(y)) {
    add_term(tangent, tangent_of(y).clone());
  }
  if (has_tangent(probs)) {
    const ExpertParameters primal{primal_of(experts.w_in),
                                  primal_of(experts.b_in),
                                  primal_of(experts.w_out),
                                  primal_of(experts.b_out)};
    const auto mixture = mixture_of(tangent_of(probs), primal_of(x), primal, activation);
    add_term(tangent, mixture.to(y.scalar_type()));
  }
  set_tangent(copy, tangent);
  return copy;
}

variable_list dense_gradient_second_gradients(const Arriving& arriving,
                                              const at::Tensor& grad,
                                              const at::Tensor& x,
                                              const ExpertParameters& experts,
                                              const ExpertActivation& activation) {
  const auto backward = [&](const variable_list& given) {
    return variable_list{
        compose_dense_gradient(given[0], given[1], experts_from(given, 2), activation)};
  };
  return vjp(backward, with_experts({grad, x}, experts), arriving.wanted, arriving.grads);
}

at::Tensor attach_dense_gradient_backward_autograd(const at::Tensor& grad,
                                                   const at::Tensor& x,
                                                   const ExpertParameters& experts,
                                                   const ExpertActivation& activation) {
  check_attach_dense_gradient_backward(grad, x, experts, activation);
  if (has_tangent(grad, x, experts)) {
    return compose_dense_gradient(grad, x, experts, activation);
  }
  const auto grad_probs =
      below_autograd([&] { return attach_dense_gradient_backward(grad, x, experts, activation); });
  record_node<&dense_gradient_second_gradients>("attach_dense_gradient_backward",
                                                {grad_probs},
                                                std::tie(grad, x, experts),
                                                grad,
                                                x,
                                                experts,
                                                activation);
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("attach_dense_gradient", with_records<&attach_dense_gradient_autograd>);
  m.impl("_attach_dense_gradient_backward", with_records<&attach_dense_gradient_backward_autograd>);
}

}  // namespace torchmoe

#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd/activate.h"
#include "autograd/expert_list.h"
#include "autograd/node.h"
#include "autograd/tangents.h"
#include "autograd/vjp.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "ops/grouped_linear.h"
#include "ops/permute.h"
#include "ops/unpermute.h"

namespace torchmoe {

namespace {

using ExpertMlpMask = std::array<bool, 6>;

/// The op from its pieces, each differentiable any number of times. It keeps what they keep, arrays
/// of N rows.
at::Tensor compose_expert_mlp(const at::Tensor& x,
                              const at::Tensor& weights,
                              const ExpertParameters& experts,
                              const DispatchPlan& plan,
                              const ExpertActivation& activation) {
  const auto& offsets = plan.expert_offsets;
  const auto dtype = experts.w_in.scalar_type();
  const bool is_mixed = x.scalar_type() != dtype;
  const auto rows = permute(x.to(dtype), plan);
  const auto pre = grouped_linear(rows, experts.w_in, experts.b_in, offsets);
  const auto activated = activate(pre, activation);
  const auto out = grouped_linear(activated, experts.w_out, experts.b_out, offsets);
  return is_mixed ? unpermute(out, weights.to(accumulate_dtype(dtype)), plan).to(x.scalar_type())
                  : unpermute(out, weights, plan);
}

/// The gradients of x, weights and the parameters, which are `inputs`, as far as `wanted` asks for
/// them; differentiable by `grad` and by all of them.
variable_list composed_expert_mlp_gradients(const at::Tensor& grad,
                                            const variable_list& inputs,
                                            const DispatchPlan& plan,
                                            const ExpertActivation& activation,
                                            const std::vector<bool>& wanted) {
  const auto op = [&](const variable_list& given) {
    return variable_list{
        compose_expert_mlp(given[0], given[1], experts_from(given, 2), plan, activation)};
  };
  return vjp(op, inputs, wanted, {grad});
}

variable_list expert_mlp_gradients(const Arriving& arriving,
                                   const at::Tensor& x,
                                   const at::Tensor& weights,
                                   const ExpertParameters& experts,
                                   const DispatchPlan& plan,
                                   const at::Tensor& pre,
                                   const ExpertActivation& activation) {
  ExpertMlpMask mask{};
  std::copy(arriving.wanted.begin(), arriving.wanted.end(), mask.begin());
  const auto grads = std::apply(
      [](const auto&... grad) { return variable_list{grad...}; },
      expert_mlp_backward(arriving.grads[0], x, weights, experts, plan, pre, mask, activation));
  variable_list result;
  for (size_t i = 0; i < grads.size(); ++i) {
    result.push_back(gradient_if(mask[i], grads[i]));
  }
  return result;
}

at::Tensor expert_mlp_autograd(const at::Tensor& x,
                               const at::Tensor& indices,
                               const at::Tensor& weights,
                               const ExpertParameters& experts,
                               const ExpertActivation& activation) {
  check_expert_mlp(x, indices, weights, experts, activation);
  const bool wanted = wants_gradient(x, weights, experts);
  if (!wanted && !has_tangent(x, weights, experts)) {
    return below_autograd([&] { return expert_mlp(x, indices, weights, experts, activation); });
  }
  const auto plan = dispatch_plan(indices, experts.w_in.sym_size(0));
  return std::get<0>(expert_mlp_forward(x, weights, experts, plan, wanted, activation));
}

/// Wide results are parts of a sum that the caller differentiates as a whole.
template <typename... Inputs>
void check_derivative(std::string_view op, bool wide, const Inputs&... inputs) {
  TORCH_CHECK(!wide || !(wants_gradient(inputs...) || has_tangent(inputs...)),
              op,
              ": wide must be false where an input requires a gradient or has a tangent, got true");
}

/// The op's node is that of its private part, since this is what the next transform of torch.func
/// is given. y alone is differentiable.
std::tuple<at::Tensor, at::Tensor> expert_mlp_forward_autograd(const at::Tensor& x,
                                                               const at::Tensor& weights,
                                                               const ExpertParameters& experts,
                                                               const DispatchPlan& plan,
                                                               bool save_pre,
                                                               const ExpertActivation& activation,
                                                               bool wide) {
  check_expert_mlp_forward(x, weights, experts, plan, activation);
  check_derivative("_expert_mlp", wide, x, weights, experts);
  const auto below = [&](bool keep_pre) {
    return below_autograd(
        [&] { return expert_mlp_forward(x, weights, experts, plan, keep_pre, activation, wide); });
  };
  const auto no_rows = [&] { return experts.w_in.new_empty_symint({0, experts.w_in.sym_size(1)}); };
  if (has_tangent(x, weights, experts)) {
    auto y = compose_expert_mlp(x, weights, experts, plan, activation);
    return {y, save_pre ? std::get<1>(below(true)) : no_rows()};
  }
  // A transform around this one can want a gradient that this one does not.
  const bool wanted = wants_gradient(x, weights, experts);
  auto [y, pre] = below(save_pre || wanted);
  record_node<&expert_mlp_gradients>(
      "expert_mlp", {y}, std::tie(x, weights, experts), x, weights, experts, plan, pre, activation);
  return {y, save_pre ? pre : no_rows()};
}

variable_list expert_mlp_second_gradients(const Arriving& arriving,
                                          const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const at::Tensor& weights,
                                          const ExpertParameters& experts,
                                          const DispatchPlan& plan,
                                          const ExpertActivation& activation) {
  std::vector<bool> reached;
  for (const auto& second : arriving.grads) {
    reached.push_back(second.defined());
  }
  const auto backward = [&](const variable_list& given) {
    const variable_list inputs(given.begin() + 1, given.end());
    return composed_expert_mlp_gradients(given[0], inputs, plan, activation, reached);
  };
  return vjp(backward, with_experts({grad, x, weights}, experts), arriving.wanted, arriving.grads);
}

ExpertMlpGradients expert_mlp_backward_autograd(const at::Tensor& grad,
                                                const at::Tensor& x,
                                                const at::Tensor& weights,
                                                const ExpertParameters& experts,
                                                const DispatchPlan& plan,
                                                const at::Tensor& pre,
                                                ExpertMlpMask output_mask,
                                                const ExpertActivation& activation,
                                                bool wide) {
  check_expert_mlp_backward(grad, x, weights, experts, plan, pre, activation);
  check_derivative("_expert_mlp_backward", wide, grad, x, weights, experts);
  if (has_tangent(grad, x, weights, experts)) {
    const auto inputs = with_experts({x, weights}, experts);
    const std::vector<bool> wanted(output_mask.begin(), output_mask.end());
    auto grads = composed_expert_mlp_gradients(grad, inputs, plan, activation, wanted);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) {
        grads[i] = wanted[i] && inputs[i].defined() ? at::zeros_like(inputs[i])
                                                    : at::empty({0}, x.options());
      }
    }
    return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
  }
  auto results = below_autograd([&] {
    return expert_mlp_backward(grad, x, weights, experts, plan, pre, output_mask, activation, wide);
  });
  record_node<&expert_mlp_second_gradients>(
      "expert_mlp_backward",
      std::apply([](const auto&... result) { return variable_list{result...}; }, results),
      std::tie(grad, x, weights, experts),
      grad,
      x,
      weights,
      experts,
      plan,
      activation);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("expert_mlp", with_records<&expert_mlp_autograd>);
  m.impl("_expert_mlp", with_records<&expert_mlp_forward_autograd>);
  m.impl("_expert_mlp_backward", with_records<&expert_mlp_backward_autograd>);
}

}  // namespace torchmoe

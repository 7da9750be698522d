#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "ops/unpermute.h"

namespace torchmoe {

at::Tensor expert_mlp(const at::Tensor& x,
                      const at::Tensor& indices,
                      const at::Tensor& weights,
                      const ExpertParameters& experts,
                      const ExpertActivation& activation) {
  static const auto op = find_op<decltype(expert_mlp)>("torchmoe::expert_mlp");
  return call(op, x, indices, weights, experts, activation);
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_forward(const at::Tensor& x,
                                                      const at::Tensor& weights,
                                                      const ExpertParameters& experts,
                                                      const DispatchPlan& plan,
                                                      bool save_pre,
                                                      const ExpertActivation& activation,
                                                      bool wide) {
  static const auto op = find_op<decltype(expert_mlp_forward)>("torchmoe::_expert_mlp");
  return call(op, x, weights, experts, plan, save_pre, activation, wide);
}

ExpertMlpGradients expert_mlp_backward(const at::Tensor& grad,
                                       const at::Tensor& x,
                                       const at::Tensor& weights,
                                       const ExpertParameters& experts,
                                       const DispatchPlan& plan,
                                       const at::Tensor& pre,
                                       std::array<bool, 6> output_mask,
                                       const ExpertActivation& activation,
                                       bool wide) {
  static const auto op = find_op<decltype(expert_mlp_backward)>("torchmoe::_expert_mlp_backward");
  return call(op, grad, x, weights, experts, plan, pre, output_mask, activation, wide);
}

at::ScalarType expert_mlp_result_dtype(const at::Tensor& x,
                                       const ExpertParameters& experts,
                                       bool wide) {
  return wide ? accumulate_dtype(experts.w_in.scalar_type()) : x.scalar_type();
}

namespace {

/// What the op and its private parts share; `slots` is indices or slot_to_row.
void check_tokens_and_slots(const at::Tensor& x,
                            std::string_view slots_name,
                            const at::Tensor& slots,
                            const at::Tensor& weights,
                            const ExpertParameters& experts,
                            const ExpertActivation& activation) {
  constexpr auto op = "expert_mlp";
  check_expert_parameters(op, "x", x, experts, activation);
  check_dim(op, slots_name, slots, 2, "[num_tokens, top_k]");
  check_shape(op, slots_name, slots, {x.sym_size(0), slots.sym_size(1)}, "[num_tokens, top_k]");
  check_dtype(op, slots_name, slots, at::kLong);
  check_same_device(op, slots_name, slots, "x", x);
  check_weights(op, weights, slots, "x", x);
}

void check_plan_of_experts(std::string_view op,
                           const at::Tensor& x,
                           const ExpertParameters& experts,
                           const DispatchPlan& plan) {
  check_plan(op, plan, "x", x);
  check_shape(op,
              "expert_offsets",
              plan.expert_offsets,
              {experts.w_in.sym_size(0) + 1},
              "[num_experts + 1]");
}

}  // namespace

void check_expert_mlp(const at::Tensor& x,
                      const at::Tensor& indices,
                      const at::Tensor& weights,
                      const ExpertParameters& experts,
                      const ExpertActivation& activation) {
  check_tokens_and_slots(x, "indices", indices, weights, experts, activation);
}

void check_expert_mlp_forward(const at::Tensor& x,
                              const at::Tensor& weights,
                              const ExpertParameters& experts,
                              const DispatchPlan& plan,
                              const ExpertActivation& activation) {
  check_tokens_and_slots(x, "slot_to_row", plan.slot_to_row, weights, experts, activation);
  check_plan_of_experts("expert_mlp", x, experts, plan);
}

void check_expert_mlp_backward(const at::Tensor& grad,
                               const at::Tensor& x,
                               const at::Tensor& weights,
                               const ExpertParameters& experts,
                               const DispatchPlan& plan,
                               const at::Tensor& pre,
                               const ExpertActivation& activation) {
  constexpr auto op = "_expert_mlp_backward";
  check_tokens_and_slots(x, "slot_to_row", plan.slot_to_row, weights, experts, activation);
  check_shape(op, "grad", grad, {x.sym_size(0), x.sym_size(1)}, "[num_tokens, hidden_size]");
  check_gradient(op, grad, "x", x);
  check_shape(
      op,
      "pre",
      pre,
      {plan.slot_to_row.sym_size(0) * plan.slot_to_row.sym_size(1), experts.w_in.sym_size(1)},
      "[num_rows, rows of w_in]");
  check_same_dtype(op, "pre", pre, "w_in", experts.w_in);
  check_same_device(op, "pre", pre, "x", x);
  check_plan_of_experts(op, x, experts, plan);
}

namespace {

/// Without a gradient to come the pre-activation is not worth its memory.
at::Tensor expert_mlp_composite(const at::Tensor& x,
                                const at::Tensor& indices,
                                const at::Tensor& weights,
                                const ExpertParameters& experts,
                                const ExpertActivation& activation) {
  check_expert_mlp(x, indices, weights, experts, activation);
  const auto plan = dispatch_plan(indices, experts.w_in.sym_size(0));
  return std::get<0>(expert_mlp_forward(x, weights, experts, plan, /*save_pre=*/false, activation));
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_meta(const at::Tensor& x,
                                                   const at::Tensor& weights,
                                                   const ExpertParameters& experts,
                                                   const DispatchPlan& plan,
                                                   bool save_pre,
                                                   const ExpertActivation& activation,
                                                   bool wide) {
  check_expert_mlp_forward(x, weights, experts, plan, activation);
  const auto saved_rows = save_pre ? plan.row_to_slot.sym_size(0) : c10::SymInt(0);
  return {
      at::empty_symint(x.sym_sizes(), x.options().dtype(expert_mlp_result_dtype(x, experts, wide))),
      at::empty_symint({saved_rows, experts.w_in.sym_size(1)}, experts.w_in.options())};
}

ExpertMlpGradients expert_mlp_backward_meta(const at::Tensor& grad,
                                            const at::Tensor& x,
                                            const at::Tensor& weights,
                                            const ExpertParameters& experts,
                                            const DispatchPlan& plan,
                                            const at::Tensor& pre,
                                            std::array<bool, 6> output_mask,
                                            const ExpertActivation& activation,
                                            bool wide) {
  check_expert_mlp_backward(grad, x, weights, experts, plan, pre, activation);
  const ExpertMlpWanted wanted(output_mask);
  const auto& w_in = experts.w_in;
  const auto& w_out = experts.w_out;
  const auto result = x.options().dtype(expert_mlp_result_dtype(x, experts, wide));
  return {empty_if(wanted.x, x.sym_sizes(), result),
          empty_if(wanted.weights, weights.sym_sizes(), weights.options()),
          empty_oriented_if(wanted.w_in, w_in),
          empty_if(wanted.b_in, {w_in.sym_size(0), w_in.sym_size(1)}, w_in.options()),
          empty_oriented_if(wanted.w_out, w_out),
          empty_if(wanted.b_out, {w_out.sym_size(0), w_out.sym_size(1)}, w_out.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp", with_records<&expert_mlp_composite>);
}

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("_expert_mlp", with_records<&expert_mlp_meta>);
  m.impl("_expert_mlp_backward", with_records<&expert_mlp_backward_meta>);
}

}  // namespace torchmoe

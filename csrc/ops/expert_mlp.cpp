#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/checks.h"
#include "common/find_op.h"
#include "common/output_mask.h"
#include "ops/unpermute.h"

namespace torchmoe {

at::Tensor expert_mlp(const at::Tensor& x,
                      const at::Tensor& indices,
                      const at::Tensor& weights,
                      const at::Tensor& w_in,
                      const std::optional<at::Tensor>& b_in,
                      const at::Tensor& w_out,
                      const std::optional<at::Tensor>& b_out,
                      std::string_view activation) {
  static const auto op = find_op<decltype(expert_mlp)>("torchmoe::expert_mlp");
  return op.call(x, indices, weights, w_in, b_in, w_out, b_out, activation);
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_forward(const at::Tensor& x,
                                                      const at::Tensor& weights,
                                                      const at::Tensor& w_in,
                                                      const std::optional<at::Tensor>& b_in,
                                                      const at::Tensor& w_out,
                                                      const std::optional<at::Tensor>& b_out,
                                                      const DispatchPlan& plan,
                                                      std::string_view activation,
                                                      bool save_pre) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       const std::optional<at::Tensor>&,
                                                       const at::Tensor&,
                                                       const std::optional<at::Tensor>&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       std::string_view,
                                                       bool);
  static const auto op = find_op<Signature>("torchmoe::_expert_mlp");
  return op.call(x,
                 weights,
                 w_in,
                 b_in,
                 w_out,
                 b_out,
                 plan.expert_offsets,
                 plan.row_to_slot,
                 plan.slot_to_row,
                 activation,
                 save_pre);
}

ExpertMlpGradients expert_mlp_backward(const at::Tensor& grad,
                                       const at::Tensor& x,
                                       const at::Tensor& weights,
                                       const at::Tensor& w_in,
                                       const std::optional<at::Tensor>& b_in,
                                       const at::Tensor& w_out,
                                       const std::optional<at::Tensor>& b_out,
                                       const DispatchPlan& plan,
                                       const at::Tensor& pre,
                                       std::string_view activation,
                                       std::array<bool, 6> output_mask) {
  using Signature = ExpertMlpGradients(const at::Tensor&,
                                       const at::Tensor&,
                                       const at::Tensor&,
                                       const at::Tensor&,
                                       const std::optional<at::Tensor>&,
                                       const at::Tensor&,
                                       const std::optional<at::Tensor>&,
                                       const at::Tensor&,
                                       const at::Tensor&,
                                       const at::Tensor&,
                                       const at::Tensor&,
                                       std::string_view,
                                       std::array<bool, 6>);
  static const auto op = find_op<Signature>("torchmoe::_expert_mlp_backward");
  return op.call(grad,
                 x,
                 weights,
                 w_in,
                 b_in,
                 w_out,
                 b_out,
                 plan.expert_offsets,
                 plan.row_to_slot,
                 plan.slot_to_row,
                 pre,
                 activation,
                 output_mask);
}

void check_expert_weights(std::string_view op,
                          const at::Tensor& x,
                          const at::Tensor& w_in,
                          const std::optional<at::Tensor>& b_in,
                          const at::Tensor& w_out,
                          const std::optional<at::Tensor>& b_out,
                          std::string_view activation) {
  const auto chosen = choose_activation(op, activation);
  check_dim(op, "x", x, 2, "[num_tokens, hidden_size]");
  check_floating(op, "x", x);
  check_dim(op, "w_out", w_out, 3, "[num_experts, hidden_size, intermediate_size]");
  const auto num_experts = w_out.sym_size(0);
  const auto intermediate = w_out.sym_size(2);
  const auto pre_width = is_gated(chosen) ? 2 * intermediate : intermediate;
  const auto w_in_layout = is_gated(chosen) ? "[num_experts, 2 * intermediate_size, hidden_size]"
                                            : "[num_experts, intermediate_size, hidden_size]";
  check_shape(op,
              "w_out",
              w_out,
              {num_experts, x.sym_size(1), intermediate},
              "[num_experts, hidden_size, intermediate_size]");
  check_shape(op, "w_in", w_in, {num_experts, pre_width, x.sym_size(1)}, w_in_layout);
  // The matrices are the layer's and x the caller's, so that x is what is of another type.
  check_floating(op, "w_in", w_in);
  check_same_dtype(op, "x", x, "w_in", w_in);
  check_same_dtype(op, "w_out", w_out, "x", x);
  check_same_device(op, "w_in", w_in, "x", x);
  check_same_device(op, "w_out", w_out, "x", x);
  if (b_in) {
    check_shape(op, "b_in", *b_in, {num_experts, pre_width}, "[num_experts, rows of w_in]");
    check_same_dtype(op, "b_in", *b_in, "x", x);
    check_same_device(op, "b_in", *b_in, "x", x);
  }
  if (b_out) {
    check_shape(op, "b_out", *b_out, {num_experts, x.sym_size(1)}, "[num_experts, hidden_size]");
    check_same_dtype(op, "b_out", *b_out, "x", x);
    check_same_device(op, "b_out", *b_out, "x", x);
  }
}

void check_expert_mlp(const at::Tensor& x,
                      const at::Tensor& slots,
                      std::string_view slots_name,
                      const at::Tensor& weights,
                      const at::Tensor& w_in,
                      const std::optional<at::Tensor>& b_in,
                      const at::Tensor& w_out,
                      const std::optional<at::Tensor>& b_out,
                      std::string_view activation) {
  constexpr auto op = "expert_mlp";
  check_expert_weights(op, x, w_in, b_in, w_out, b_out, activation);
  check_dim(op, slots_name, slots, 2, "[num_tokens, top_k]");
  check_shape(op, slots_name, slots, {x.sym_size(0), slots.sym_size(1)}, "[num_tokens, top_k]");
  check_dtype(op, slots_name, slots, at::kLong);
  check_same_device(op, slots_name, slots, "x", x);
  check_weights(op, weights, slots, "x", x);
}

void check_expert_mlp_plan(std::string_view op,
                           const at::Tensor& x,
                           const at::Tensor& w_in,
                           const at::Tensor& expert_offsets,
                           const at::Tensor& row_to_slot,
                           const at::Tensor& slot_to_row) {
  check_plan(op, expert_offsets, row_to_slot, slot_to_row, "x", x);
  check_shape(op, "expert_offsets", expert_offsets, {w_in.sym_size(0) + 1}, "[num_experts + 1]");
}

void check_expert_mlp_backward(const at::Tensor& grad,
                               const at::Tensor& x,
                               const at::Tensor& slot_to_row,
                               const at::Tensor& weights,
                               const at::Tensor& w_in,
                               const std::optional<at::Tensor>& b_in,
                               const at::Tensor& w_out,
                               const std::optional<at::Tensor>& b_out,
                               const at::Tensor& pre,
                               std::string_view activation) {
  constexpr auto op = "_expert_mlp_backward";
  check_expert_mlp(x, slot_to_row, "slot_to_row", weights, w_in, b_in, w_out, b_out, activation);
  check_shape(op, "grad", grad, {x.sym_size(0), x.sym_size(1)}, "[num_tokens, hidden_size]");
  check_gradient(op, grad, "x", x);
  check_shape(op,
              "pre",
              pre,
              {slot_to_row.sym_size(0) * slot_to_row.sym_size(1), w_in.sym_size(1)},
              "[num_rows, rows of w_in]");
  check_same_dtype(op, "pre", pre, "x", x);
  check_same_device(op, "pre", pre, "x", x);
}

namespace {

/// Without a gradient to come the pre-activation is not worth its memory.
at::Tensor expert_mlp_composite(const at::Tensor& x,
                                const at::Tensor& indices,
                                const at::Tensor& weights,
                                const at::Tensor& w_in,
                                const std::optional<at::Tensor>& b_in,
                                const at::Tensor& w_out,
                                const std::optional<at::Tensor>& b_out,
                                std::string_view activation) {
  check_expert_mlp(x, indices, "indices", weights, w_in, b_in, w_out, b_out, activation);
  const auto plan = dispatch_plan(indices, w_in.sym_size(0));
  return std::get<0>(expert_mlp_forward(
      x, weights, w_in, b_in, w_out, b_out, plan, activation, /*save_pre=*/false));
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_meta(const at::Tensor& x,
                                                   const at::Tensor& weights,
                                                   const at::Tensor& w_in,
                                                   const std::optional<at::Tensor>& b_in,
                                                   const at::Tensor& w_out,
                                                   const std::optional<at::Tensor>& b_out,
                                                   const at::Tensor& expert_offsets,
                                                   const at::Tensor& row_to_slot,
                                                   const at::Tensor& slot_to_row,
                                                   std::string_view activation,
                                                   bool save_pre) {
  check_expert_mlp(x, slot_to_row, "slot_to_row", weights, w_in, b_in, w_out, b_out, activation);
  check_expert_mlp_plan("expert_mlp", x, w_in, expert_offsets, row_to_slot, slot_to_row);
  const auto saved_rows = save_pre ? row_to_slot.sym_size(0) : c10::SymInt(0);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({saved_rows, w_in.sym_size(1)}, x.options())};
}

ExpertMlpGradients expert_mlp_backward_meta(const at::Tensor& grad,
                                            const at::Tensor& x,
                                            const at::Tensor& weights,
                                            const at::Tensor& w_in,
                                            const std::optional<at::Tensor>& b_in,
                                            const at::Tensor& w_out,
                                            const std::optional<at::Tensor>& b_out,
                                            const at::Tensor& expert_offsets,
                                            const at::Tensor& row_to_slot,
                                            const at::Tensor& slot_to_row,
                                            const at::Tensor& pre,
                                            std::string_view activation,
                                            std::array<bool, 6> output_mask) {
  check_expert_mlp_backward(
      grad, x, slot_to_row, weights, w_in, b_in, w_out, b_out, pre, activation);
  check_expert_mlp_plan("_expert_mlp_backward", x, w_in, expert_offsets, row_to_slot, slot_to_row);
  return {empty_if(output_mask[0], x.sym_sizes(), x.options()),
          empty_if(output_mask[1], weights.sym_sizes(), weights.options()),
          empty_if(output_mask[2], w_in.sym_sizes(), w_in.options()),
          empty_if(output_mask[3], {w_in.sym_size(0), w_in.sym_size(1)}, w_in.options()),
          empty_if(output_mask[4], w_out.sym_sizes(), w_out.options()),
          empty_if(output_mask[5], {w_out.sym_size(0), w_out.sym_size(1)}, w_out.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp", &expert_mlp_composite);
}

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("_expert_mlp", &expert_mlp_meta);
  m.impl("_expert_mlp_backward", &expert_mlp_backward_meta);
}

}  // namespace torchmoe

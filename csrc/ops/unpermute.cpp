#include "ops/unpermute.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor unpermute(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan) {
  using Signature = at::Tensor(const at::Tensor&,
                               const at::Tensor&,
                               const at::Tensor&,
                               const at::Tensor&,
                               const at::Tensor&);
  static const auto op = find_op<Signature>("torchmoe::unpermute");
  return op.call(rows, weights, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(const at::Tensor& grad,
                                                      const at::Tensor& rows,
                                                      const at::Tensor& weights,
                                                      const DispatchPlan& plan) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&,
                                                       const at::Tensor&);
  static const auto op = find_op<Signature>("torchmoe::_unpermute_backward");
  return op.call(grad, rows, weights, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

void check_weights(std::string_view op,
                   const at::Tensor& weights,
                   const at::Tensor& slots,
                   std::string_view like_name,
                   const at::Tensor& like) {
  check_shape(
      op, "weights", weights, {slots.sym_size(0), slots.sym_size(1)}, "[num_tokens, top_k]");
  const auto dtype = weights.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == like.scalar_type(),
              op,
              ": weights must be float32, float64 or the dtype of ",
              like_name,
              " (",
              like.scalar_type(),
              "), got ",
              dtype);
  check_same_device(op, "weights", weights, like_name, like);
}

void check_unpermute(const at::Tensor& rows,
                     const at::Tensor& weights,
                     const at::Tensor& expert_offsets,
                     const at::Tensor& row_to_slot,
                     const at::Tensor& slot_to_row) {
  constexpr auto op = "unpermute";
  check_dim(op, "rows", rows, 2, "[num_rows, hidden_size]");
  check_floating(op, "rows", rows);
  check_plan(op, expert_offsets, row_to_slot, slot_to_row, "rows", rows);
  check_shape(
      op, "rows", rows, {row_to_slot.sym_size(0), rows.sym_size(1)}, "[num_rows, hidden_size]");
  check_weights(op, weights, slot_to_row, "rows", rows);
}

void check_unpermute_backward(const at::Tensor& grad,
                              const at::Tensor& rows,
                              const at::Tensor& weights,
                              const at::Tensor& expert_offsets,
                              const at::Tensor& row_to_slot,
                              const at::Tensor& slot_to_row) {
  check_unpermute(rows, weights, expert_offsets, row_to_slot, slot_to_row);
  constexpr auto op = "_unpermute_backward";
  check_shape(
      op, "grad", grad, {slot_to_row.sym_size(0), rows.sym_size(1)}, "[num_tokens, hidden_size]");
  check_gradient(op, grad, "rows", rows);
}

namespace {

at::Tensor unpermute_meta(const at::Tensor& rows,
                          const at::Tensor& weights,
                          const at::Tensor& expert_offsets,
                          const at::Tensor& row_to_slot,
                          const at::Tensor& slot_to_row) {
  check_unpermute(rows, weights, expert_offsets, row_to_slot, slot_to_row);
  return at::empty_symint({slot_to_row.sym_size(0), rows.sym_size(1)}, rows.options());
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_meta(const at::Tensor& grad,
                                                           const at::Tensor& rows,
                                                           const at::Tensor& weights,
                                                           const at::Tensor& expert_offsets,
                                                           const at::Tensor& row_to_slot,
                                                           const at::Tensor& slot_to_row) {
  check_unpermute_backward(grad, rows, weights, expert_offsets, row_to_slot, slot_to_row);
  return {at::empty_symint(rows.sym_sizes(), rows.options()),
          at::empty_symint(weights.sym_sizes(), weights.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("unpermute", &unpermute_meta);
  m.impl("_unpermute_backward", &unpermute_backward_meta);
}

}  // namespace torchmoe

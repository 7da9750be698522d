#include "ops/permute.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

using Signature = at::Tensor(const at::Tensor&,
                             const at::Tensor&,
                             const at::Tensor&,
                             const at::Tensor&);

}  // namespace

at::Tensor permute(const at::Tensor& x, const DispatchPlan& plan) {
  static const auto op = find_op<Signature>("torchmoe::permute");
  return op.call(x, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

at::Tensor permute_backward(const at::Tensor& grad, const DispatchPlan& plan) {
  static const auto op = find_op<Signature>("torchmoe::_permute_backward");
  return op.call(grad, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

void check_permute(const at::Tensor& x,
                   const at::Tensor& expert_offsets,
                   const at::Tensor& row_to_slot,
                   const at::Tensor& slot_to_row) {
  constexpr auto op = "permute";
  check_dim(op, "x", x, 2, "[num_tokens, hidden_size]");
  check_floating(op, "x", x);
  check_plan(op, expert_offsets, row_to_slot, slot_to_row, "x", x);
  TORCH_CHECK(slot_to_row.sym_size(0) == x.sym_size(0),
              op,
              ": slot_to_row must have one row per token of x (",
              x.sym_size(0),
              "), got shape ",
              slot_to_row.sym_sizes());
}

void check_permute_backward(const at::Tensor& grad,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& row_to_slot,
                            const at::Tensor& slot_to_row) {
  constexpr auto op = "_permute_backward";
  check_dim(op, "grad", grad, 2, "[num_rows, hidden_size]");
  check_floating(op, "grad", grad);
  check_plan(op, expert_offsets, row_to_slot, slot_to_row, "grad", grad);
  check_shape(
      op, "grad", grad, {row_to_slot.sym_size(0), grad.sym_size(1)}, "[num_rows, hidden_size]");
}

namespace {

at::Tensor permute_meta(const at::Tensor& x,
                        const at::Tensor& expert_offsets,
                        const at::Tensor& row_to_slot,
                        const at::Tensor& slot_to_row) {
  check_permute(x, expert_offsets, row_to_slot, slot_to_row);
  return at::empty_symint({row_to_slot.sym_size(0), x.sym_size(1)}, x.options());
}

at::Tensor permute_backward_meta(const at::Tensor& grad,
                                 const at::Tensor& expert_offsets,
                                 const at::Tensor& row_to_slot,
                                 const at::Tensor& slot_to_row) {
  check_permute_backward(grad, expert_offsets, row_to_slot, slot_to_row);
  return at::empty_symint({slot_to_row.sym_size(0), grad.sym_size(1)}, grad.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("permute", &permute_meta);
  m.impl("_permute_backward", &permute_backward_meta);
}

}  // namespace torchmoe

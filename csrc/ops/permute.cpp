#include "ops/permute.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor permute(const at::Tensor& x, const DispatchPlan& plan) {
  static const auto op = find_op<decltype(permute)>("torchmoe::permute");
  return call(op, x, plan);
}

at::Tensor permute_backward(const at::Tensor& grad, const DispatchPlan& plan) {
  static const auto op = find_op<decltype(permute_backward)>("torchmoe::_permute_backward");
  return call(op, grad, plan);
}

void check_permute(const at::Tensor& x, const DispatchPlan& plan) {
  constexpr auto op = "permute";
  check_dim(op, "x", x, 2, "[num_tokens, hidden_size]");
  check_floating(op, "x", x);
  check_plan(op, plan, "x", x);
  TORCH_CHECK(plan.slot_to_row.sym_size(0) == x.sym_size(0),
              op,
              ": slot_to_row must have one row per token of x (",
              x.sym_size(0),
              "), got shape ",
              plan.slot_to_row.sym_sizes());
}

void check_permute_backward(const at::Tensor& grad, const DispatchPlan& plan) {
  constexpr auto op = "_permute_backward";
  check_dim(op, "grad", grad, 2, "[num_rows, hidden_size]");
  check_floating(op, "grad", grad);
  check_plan(op, plan, "grad", grad);
  check_shape(op,
              "grad",
              grad,
              {plan.row_to_slot.sym_size(0), grad.sym_size(1)},
              "[num_rows, hidden_size]");
}

namespace {

at::Tensor permute_meta(const at::Tensor& x, const DispatchPlan& plan) {
  check_permute(x, plan);
  return at::empty_symint({plan.row_to_slot.sym_size(0), x.sym_size(1)}, x.options());
}

at::Tensor permute_backward_meta(const at::Tensor& grad, const DispatchPlan& plan) {
  check_permute_backward(grad, plan);
  return at::empty_symint({plan.slot_to_row.sym_size(0), grad.sym_size(1)}, grad.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("permute", with_records<&permute_meta>);
  m.impl("_permute_backward", with_records<&permute_backward_meta>);
}

}  // namespace torchmoe

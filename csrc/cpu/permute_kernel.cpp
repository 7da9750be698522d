#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "cpu/plan_reader.h"
#include "cpu/rows.h"
#include "ops/permute.h"

namespace torchmoe {

namespace {

at::Tensor permute_kernel(const at::Tensor& x, const DispatchPlan& plan) {
  check_permute(x, plan);
  const cpu::PlanReader plan_c(plan);
  const auto x_c = x.contiguous();
  auto rows = at::empty({plan.row_to_slot.size(0), x.size(1)}, x.options());
  with_float_type(x.scalar_type(), [&]<typename scalar_t>() {
    cpu::gather_rows(plan_c.view(),
                     x_c.const_data_ptr<scalar_t>(),
                     rows.mutable_data_ptr<scalar_t>(),
                     x.size(1));
  });
  return rows;
}

at::Tensor permute_backward_kernel(const at::Tensor& grad, const DispatchPlan& plan) {
  check_permute_backward(grad, plan);
  const cpu::PlanReader plan_c(plan);
  const auto grad_c = grad.contiguous();
  auto grad_x = at::empty({plan.slot_to_row.size(0), grad.size(1)}, grad.options());
  with_float_type(grad.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const Acc* unweighted = nullptr;
    cpu::combine_rows(plan_c.view(),
                      grad_c.const_data_ptr<scalar_t>(),
                      unweighted,
                      grad_x.mutable_data_ptr<scalar_t>(),
                      grad.size(1));
  });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("permute", with_records<&permute_kernel>);
  m.impl("_permute_backward", with_records<&permute_backward_kernel>);
}

}  // namespace torchmoe

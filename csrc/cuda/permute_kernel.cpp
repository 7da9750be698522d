#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "cuda/device.h"
#include "cuda/plan_tensors.h"
#include "cuda/rows.h"
#include "ops/permute.h"

namespace torchmoe {

namespace {

at::Tensor permute_kernel(const at::Tensor& x, const DispatchPlan& plan) {
  check_permute(x, plan);
  const cuda::OnDevice device(x);
  const cuda::PlanTensors plan_c(plan);
  const auto x_c = x.contiguous();
  auto rows = at::empty({plan.row_to_slot.size(0), x.size(1)}, x.options());
  with_float_type(x.scalar_type(), [&]<typename scalar_t>() {
    cuda::gather_rows(device.stream(),
                      plan_c.plan(),
                      x_c.const_data_ptr<scalar_t>(),
                      rows.mutable_data_ptr<scalar_t>(),
                      x.size(1));
  });
  return rows;
}

at::Tensor permute_backward_kernel(const at::Tensor& grad, const DispatchPlan& plan) {
  check_permute_backward(grad, plan);
  const cuda::OnDevice device(grad);
  const cuda::PlanTensors plan_c(plan);
  const auto grad_c = grad.contiguous();
  auto grad_x = at::empty({plan.slot_to_row.size(0), grad.size(1)}, grad.options());
  with_float_type(grad.scalar_type(), [&]<typename scalar_t>() {
    const at::opmath_type<scalar_t>* unweighted = nullptr;
    cuda::combine_rows(device.stream(),
                       plan_c.plan(),
                       grad_c.const_data_ptr<scalar_t>(),
                       unweighted,
                       grad_x.mutable_data_ptr<scalar_t>(),
                       grad.size(1));
  });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("permute", with_records<&permute_kernel>);
  m.impl("_permute_backward", with_records<&permute_backward_kernel>);
}

}  // namespace torchmoe

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/plan_tensors.h"
#include "cuda/rows.h"
#include "ops/unpermute.h"

namespace torchmoe {

namespace {

at::Tensor unpermute_kernel(const at::Tensor& rows,
                            const at::Tensor& weights,
                            const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  const cuda::OnDevice device(rows);
  const cuda::PlanTensors plan_c(plan);
  const auto rows_c = rows.contiguous();
  const auto weights_acc = contiguous_as(weights, accumulate_dtype(rows.scalar_type()));
  auto y = at::empty({plan.slot_to_row.size(0), rows.size(1)}, rows.options());
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    cuda::combine_rows(device.stream(),
                       plan_c.plan(),
                       rows_c.const_data_ptr<scalar_t>(),
                       weights_acc.const_data_ptr<at::opmath_type<scalar_t>>(),
                       y.mutable_data_ptr<scalar_t>(),
                       rows.size(1));
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_kernel(const at::Tensor& grad,
                                                             const at::Tensor& rows,
                                                             const at::Tensor& weights,
                                                             const DispatchPlan& plan) {
  check_unpermute_backward(grad, rows, weights, plan);
  const cuda::OnDevice device(rows);
  const cuda::PlanTensors plan_c(plan);
  const auto acc = accumulate_dtype(rows.scalar_type());
  const auto grad_c = contiguous_as(grad, rows.scalar_type());
  const auto rows_c = rows.contiguous();
  const auto weights_acc = contiguous_as(weights, acc);
  auto grad_rows = at::empty(rows.sizes(), rows.options());
  auto grad_weights = at::empty(weights.sizes(), weights.options().dtype(acc));
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    cuda::combine_rows_backward(device.stream(),
                                plan_c.plan(),
                                grad_c.const_data_ptr<scalar_t>(),
                                rows_c.const_data_ptr<scalar_t>(),
                                weights_acc.const_data_ptr<Acc>(),
                                grad_rows.mutable_data_ptr<scalar_t>(),
                                grad_weights.mutable_data_ptr<Acc>(),
                                rows.size(1));
  });
  return {grad_rows, grad_weights.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("unpermute", with_records<&unpermute_kernel>);
  m.impl("_unpermute_backward", with_records<&unpermute_backward_kernel>);
}

}  // namespace torchmoe

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/plan_tensors.h"
#include "cuda/rows.h"
#include "ops/permute.h"

namespace torchmoe {

namespace {

at::Tensor permute_kernel(const at::Tensor& x,
                          const at::Tensor& expert_offsets,
                          const at::Tensor& row_to_slot,
                          const at::Tensor& slot_to_row) {
  check_permute(x, expert_offsets, row_to_slot, slot_to_row);
  const cuda::OnDevice device(x);
  const cuda::PlanTensors plan(expert_offsets, row_to_slot, slot_to_row);
  const auto x_c = x.contiguous();
  auto rows = at::empty({row_to_slot.size(0), x.size(1)}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "permute", [&] {
    cuda::gather_rows(device.stream(),
                      plan.plan(),
                      x_c.const_data_ptr<scalar_t>(),
                      rows.mutable_data_ptr<scalar_t>(),
                      x.size(1));
  });
  return rows;
}

at::Tensor permute_backward_kernel(const at::Tensor& grad,
                                   const at::Tensor& expert_offsets,
                                   const at::Tensor& row_to_slot,
                                   const at::Tensor& slot_to_row) {
  check_permute_backward(grad, expert_offsets, row_to_slot, slot_to_row);
  const cuda::OnDevice device(grad);
  const cuda::PlanTensors plan(expert_offsets, row_to_slot, slot_to_row);
  const auto grad_c = grad.contiguous();
  auto grad_x = at::empty({slot_to_row.size(0), grad.size(1)}, grad.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "permute_backward", [&] {
        const at::opmath_type<scalar_t>* unweighted = nullptr;
        cuda::combine_rows(device.stream(),
                           plan.plan(),
                           grad_c.const_data_ptr<scalar_t>(),
                           unweighted,
                           grad_x.mutable_data_ptr<scalar_t>(),
                           grad.size(1));
      });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("permute", &permute_kernel);
  m.impl("_permute_backward", &permute_backward_kernel);
}

}  // namespace torchmoe

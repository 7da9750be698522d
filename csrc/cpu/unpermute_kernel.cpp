#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/tensors.h"
#include "cpu/plan_reader.h"
#include "cpu/rows.h"
#include "ops/unpermute.h"

namespace torchmoe {

namespace {

/// grad_rows[r] = weight of its slot * grad[its token]; grad_weights of the slot = <grad[its
/// token], rows[r]>. Walking the slots visits every row once, unrouted ones included, since the
/// plan is a permutation.
template <typename T, typename Acc>
void unpermute_backward_kernel_impl(const PlanView& plan,
                                    const T* grad,
                                    const T* rows,
                                    const Acc* weights,
                                    T* grad_rows,
                                    Acc* grad_weights,
                                    int64_t width) {
  cpu::parallel_items(plan.num_rows(), width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = plan.slot_of(r);
      T* out = grad_rows + r * width;
      if (slot < 0) {
        std::fill(out, out + width, T(0));
        continue;
      }
      const T* in = grad + slot / plan.top_k * width;
      std::transform(in, in + width, out, [weight = weights[slot]](T g) {
        return static_cast<T>(weight * static_cast<Acc>(g));
      });
    }
  });
  cpu::parallel_items(plan.num_rows(), width, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t row = plan.row_of(slot);
      const T* in = grad + slot / plan.top_k * width;
      grad_weights[slot] = row < 0 ? Acc(0) : cpu::dot<Acc>(in, rows + row * width, width);
    }
  });
}

at::Tensor unpermute_kernel(const at::Tensor& rows,
                            const at::Tensor& weights,
                            const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  const cpu::PlanReader plan_c(plan);
  const auto rows_c = rows.contiguous();
  const auto weights_acc = contiguous_as(weights, accumulate_dtype(rows.scalar_type()));
  auto y = at::empty({plan.slot_to_row.size(0), rows.size(1)}, rows.options());
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    cpu::combine_rows(plan_c.view(),
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
  const cpu::PlanReader plan_c(plan);
  const auto acc = accumulate_dtype(rows.scalar_type());
  const auto grad_c = contiguous_as(grad, rows.scalar_type());
  const auto rows_c = rows.contiguous();
  const auto weights_acc = contiguous_as(weights, acc);
  auto grad_rows = at::empty(rows.sizes(), rows.options());
  auto grad_weights = at::empty(weights.sizes(), weights.options().dtype(acc));
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    unpermute_backward_kernel_impl(plan_c.view(),
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

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("unpermute", with_records<&unpermute_kernel>);
  m.impl("_unpermute_backward", with_records<&unpermute_backward_kernel>);
}

}  // namespace torchmoe

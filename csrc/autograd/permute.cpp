// permute is linear, so that the derivative of its backward is permute again.
#include "ops/permute.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/saved_records.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// `op` forward and `adjoint` backward.
template <auto op, auto adjoint>
class LinearInTokens : public torch::autograd::Function<LinearInTokens<op, adjoint>> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& input,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& row_to_slot,
                            const at::Tensor& slot_to_row) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({expert_offsets, row_to_slot, slot_to_row});
    return op(input, {expert_offsets, row_to_slot, slot_to_row});
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto plan = saved_plan(ctx->get_saved_variables(), 0);
    return {adjoint(grads[0], plan), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

template <auto op, auto adjoint, auto check>
at::Tensor apply(const at::Tensor& input, const DispatchPlan& plan) {
  check(input, plan);
  refuse_tangents("permute", input);
  return LinearInTokens<op, adjoint>::apply(
      input, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("permute", with_records<&apply<permute, permute_backward, check_permute>>);
  m.impl("_permute_backward",
         with_records<&apply<permute_backward, permute, check_permute_backward>>);
}

}  // namespace torchmoe

// permute is linear, so that the derivative of its backward is permute again.
#include "ops/permute.h"

#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

template <auto adjoint>
variable_list permute_gradient(const Arriving& arriving, const DispatchPlan& plan) {
  return {adjoint(arriving.grads[0], plan)};
}

template <auto op, auto adjoint, auto check>
at::Tensor linear_autograd(const at::Tensor& input, const DispatchPlan& plan) {
  check(input, plan);
  const auto result = below_autograd([&] { return op(input, plan); });
  record_node<&permute_gradient<adjoint>>("permute", {result}, std::tie(input), plan);
  if (has_tangent(input)) {
    set_tangent(result, op(tangent_of(input), plan));
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("permute", with_records<&linear_autograd<permute, permute_backward, check_permute>>);
  m.impl("_permute_backward",
         with_records<&linear_autograd<permute_backward, permute, check_permute_backward>>);
}

}  // namespace torchmoe

// The copy's derivative is declared to be `scale`, in forward mode as in reverse; no derivative of
// any order reaches scale itself.
#include "ops/scale_gradient.h"

#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

at::Tensor scaled(const at::Tensor& values, const at::Tensor& scale) {
  return at::mul(values, scale.detach()).to(values.scalar_type());
}

variable_list gradient_of_scaled_copy(const Arriving& arriving, const at::Tensor& scale) {
  return {scaled(arriving.grads[0], scale)};
}

at::Tensor scale_gradient_autograd(const at::Tensor& x, const at::Tensor& scale) {
  check_scale_gradient(x, scale);
  const auto copy = below_autograd([&] { return scale_gradient(x, scale); });
  record_node<&gradient_of_scaled_copy>("scale_gradient", {copy}, std::tie(x), scale);
  if (has_tangent(x)) {
    set_tangent(copy, scaled(tangent_of(x), scale));
  }
  return copy;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("scale_gradient", &scale_gradient_autograd);
}

}  // namespace torchmoe

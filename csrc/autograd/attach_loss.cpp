#include "ops/attach_loss.h"

#include <ATen/ops/full.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

// Without the loss itself: what its owner does to it in place afterwards is no concern of ours.
variable_list attach_loss_gradients(const Arriving& arriving,
                                    double scale,
                                    at::ScalarType dtype,
                                    const c10::Device& device) {
  return {arriving.grads[0], at::full({}, scale, at::TensorOptions(device).dtype(dtype))};
}

at::Tensor attach_loss_autograd(const at::Tensor& x, const at::Tensor& loss, double scale) {
  check_attach_loss(x, loss);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(loss),
      "attach_loss: forward-mode derivatives by loss must not be requested, got a loss with a "
      "tangent, which the result has no place for; add the loss to the objective instead");
  const auto copy = below_autograd([&] { return attach_loss(x, loss, scale); });
  record_node<&attach_loss_gradients>(
      "attach_loss", {copy}, std::tie(x, loss), scale, loss.scalar_type(), loss.device());
  if (has_tangent(x)) {
    set_tangent(copy, tangent_of(x).clone());
  }
  return copy;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("attach_loss", &attach_loss_autograd);
}

}  // namespace torchmoe

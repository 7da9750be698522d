#include "ops/attach_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AttachLoss : public torch::autograd::Function<AttachLoss> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& x,
                            const at::Tensor& loss,
                            double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // Not the loss itself: what its owner does to it in place afterwards is no concern of ours.
    ctx->saved_data["dtype"] = loss.scalar_type();
    ctx->saved_data["device"] = loss.device();
    ctx->saved_data["scale"] = scale;
    return attach_loss(x, loss, scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto options = at::TensorOptions(ctx->saved_data["device"].toDevice())
                             .dtype(ctx->saved_data["dtype"].toScalarType());
    return {grads[0], at::full({}, ctx->saved_data["scale"].toDouble(), options), at::Tensor()};
  }
};

at::Tensor attach_loss_autograd(const at::Tensor& x, const at::Tensor& loss, double scale) {
  check_attach_loss(x, loss);
  refuse_tangents("attach_loss", x, loss);
  return AttachLoss::apply(x, loss, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("attach_loss", &attach_loss_autograd);
}

}  // namespace torchmoe

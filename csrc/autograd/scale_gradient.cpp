#include "ops/scale_gradient.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ScaleGradient : public torch::autograd::Function<ScaleGradient> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({scale});
    return scale_gradient(x, scale);
  }

  // torch's product is differentiable in grad, which makes the second gradient right; scale is cut
  // off, since no gradient of any order reaches it.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto scale = ctx->get_saved_variables()[0].detach();
    return {at::mul(grads[0], scale).to(grads[0].scalar_type()), at::Tensor()};
  }
};

at::Tensor scale_gradient_autograd(const at::Tensor& x, const at::Tensor& scale) {
  check_scale_gradient(x, scale);
  refuse_tangents("scale_gradient", x, scale);
  return ScaleGradient::apply(x, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("scale_gradient", &scale_gradient_autograd);
}

}  // namespace torchmoe

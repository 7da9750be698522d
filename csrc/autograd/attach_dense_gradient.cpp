#include "ops/attach_dense_gradient.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/needed_gradients.h"
#include "autograd/once_differentiable.h"
#include "autograd/saved_records.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AttachDenseGradient : public torch::autograd::Function<AttachDenseGradient> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& y,
                            const at::Tensor& probs,
                            const at::Tensor& x,
                            const at::Tensor& w_in,
                            const std::optional<at::Tensor>& b_in,
                            const at::Tensor& w_out,
                            const std::optional<at::Tensor>& b_out,
                            std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {x, w_in, b_in.value_or(at::Tensor()), w_out, b_out.value_or(at::Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["probs_dtype"] = probs.scalar_type();
    return attach_dense_gradient(y, probs, x, {w_in, b_in, w_out, b_out}, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    NeededGradients needed(ctx);
    needed.next();  // y
    at::Tensor grad_probs;
    if (needed.next()) {
      grad_probs = attach_dense_gradient_backward(grads[0],
                                                  saved[0],
                                                  saved_experts(saved, 1),
                                                  ctx->saved_data["activation"].toStringRef())
                       .to(ctx->saved_data["probs_dtype"].toScalarType());
    }
    variable_list result(8);
    result[0] = grads[0];
    result[1] = grad_probs;
    return result;
  }
};

at::Tensor attach_dense_gradient_autograd(const at::Tensor& y,
                                          const at::Tensor& probs,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          std::string_view activation) {
  check_attach_dense_gradient(y, probs, x, experts, activation);
  refuse_tangents("attach_dense_gradient", y, probs, x, experts);
  return AttachDenseGradient::apply(
      y, probs, x, experts.w_in, experts.b_in, experts.w_out, experts.b_out, activation);
}

at::Tensor attach_dense_gradient_backward_autograd(const at::Tensor& grad,
                                                   const at::Tensor& x,
                                                   const ExpertParameters& experts,
                                                   std::string_view activation) {
  check_attach_dense_gradient_backward(grad, x, experts, activation);
  refuse_tangents("attach_dense_gradient", grad, x, experts);
  variable_list inputs{grad, x, experts.w_in, experts.w_out};
  for (const auto& bias : {experts.b_in, experts.b_out}) {
    if (bias) {
      inputs.push_back(*bias);
    }
  }
  const auto grads = OnceDifferentiable::apply(
      at::TensorList(inputs),
      [&] { return variable_list{attach_dense_gradient_backward(grad, x, experts, activation)}; },
      "attach_dense_gradient: double backward must not be requested, got a gradient of the "
      "gradient");
  return grads[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("attach_dense_gradient", with_records<&attach_dense_gradient_autograd>);
  m.impl("_attach_dense_gradient_backward", with_records<&attach_dense_gradient_backward_autograd>);
}

}  // namespace torchmoe

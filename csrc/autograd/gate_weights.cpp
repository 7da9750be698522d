#include "ops/gate_weights.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/once_differentiable.h"
#include "common/vocabulary.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class GateWeights : public torch::autograd::Function<GateWeights> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& logits,
                            const at::Tensor& indices,
                            std::string_view score_function,
                            std::string_view normalize,
                            std::string_view estimator) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({logits, indices});
    ctx->saved_data["score_function"] = std::string(score_function);
    ctx->saved_data["normalize"] = std::string(normalize);
    ctx->saved_data["estimator"] = std::string(estimator);
    return gate_weights(logits, indices, score_function, normalize, estimator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {gate_weights_backward(grads[0],
                                  saved[0],
                                  saved[1],
                                  ctx->saved_data["score_function"].toStringRef(),
                                  ctx->saved_data["normalize"].toStringRef(),
                                  ctx->saved_data["estimator"].toStringRef()),
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

/// Weights that do not depend on the logits would leave the router untrained without a word.
void refuse_zero_gradient(const at::Tensor& logits,
                          const at::Tensor& indices,
                          std::string_view normalize,
                          std::string_view estimator) {
  constexpr auto op = "gate_weights";
  if (!at::GradMode::is_enabled() || !logits.requires_grad() ||
      choose<GateEstimator>(op, estimator) != GateEstimator::exact) {
    return;
  }
  const auto chosen = choose<Normalize>(op, normalize);
  const bool single = chosen == Normalize::topk && indices.dim() == 2 && indices.sym_size(1) == 1;
  TORCH_CHECK_VALUE(chosen != Normalize::uniform && !single,
                    op,
                    ": estimator must be \"straight_through\", or normalize \"none\", for the "
                    "router to learn, got estimator \"exact\" with normalize \"",
                    normalize,
                    "\"",
                    single ? " and top_k 1" : "",
                    ", whose gradient is zero everywhere");
}

at::Tensor gate_weights_autograd(const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator) {
  check_gate_weights(logits, indices, score_function, normalize, estimator);
  refuse_tangents("gate_weights", logits);
  refuse_zero_gradient(logits, indices, normalize, estimator);
  return GateWeights::apply(logits, indices, score_function, normalize, estimator);
}

at::Tensor gate_weights_backward_autograd(const at::Tensor& grad,
                                          const at::Tensor& logits,
                                          const at::Tensor& indices,
                                          std::string_view score_function,
                                          std::string_view normalize,
                                          std::string_view estimator) {
  check_gate_weights_backward(grad, logits, indices, score_function, normalize, estimator);
  refuse_tangents("gate_weights", grad, logits);
  const variable_list inputs{grad, logits};
  return OnceDifferentiable::apply(
      at::TensorList(inputs),
      [&] {
        return variable_list{
            gate_weights_backward(grad, logits, indices, score_function, normalize, estimator)};
      },
      "gate_weights: double backward must not be requested, got a gradient of the gradient; "
      "compose the weights from torch's own ops where a second derivative is needed")[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("gate_weights", &gate_weights_autograd);
  m.impl("_gate_weights_backward", &gate_weights_backward_autograd);
}

}  // namespace torchmoe

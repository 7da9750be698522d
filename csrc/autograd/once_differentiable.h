// The refusal of double backward, for ops whose second derivative is not implemented.
#pragma once

#include <functional>
#include <string>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

namespace torchmoe {

/// Runs a backward op so that a derivative of its results raises `refusal`, a sentence naming the
/// op. `inputs` are the tensors that the results depend on; torch tracks those of an
/// at::TensorList, not those of a vector. A kernel that throws, or a check of the grad mode, would
/// break ordinary backward and tracing; a node that throws when it is reached does not.
class OnceDifferentiable : public torch::autograd::Function<OnceDifferentiable> {
 public:
  static constexpr bool is_traceable = true;
  using Gradients = torch::autograd::variable_list;

  static Gradients forward(torch::autograd::AutogradContext* ctx,
                           at::TensorList /*inputs*/,
                           const std::function<Gradients()>& backward_op,
                           const std::string& refusal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["refusal"] = refusal;
    return backward_op();
  }

  static Gradients backward(torch::autograd::AutogradContext* ctx, const Gradients& /*grads*/) {
    TORCH_CHECK(false, ctx->saved_data["refusal"].toStringRef());
  }
};

}  // namespace torchmoe

// Which inputs of an autograd Function want a gradient.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace torchmoe {

/// Walks forward's tensor arguments in order. AutogradContext::needs_input_grad counts present
/// tensors only, so an absent optional one shifts the index of all that follow.
class NeededGradients {
 public:
  explicit NeededGradients(const torch::autograd::AutogradContext* ctx) : ctx_(ctx) {}

  /// Whether the next tensor argument wants a gradient; an absent one does not.
  bool next(bool present = true) { return present && ctx_->needs_input_grad(index_++); }

 private:
  const torch::autograd::AutogradContext* ctx_;
  size_t index_ = 0;
};

/// The gradient as autograd wants it: undefined where output_mask left it out.
inline at::Tensor gradient_if(bool wanted, const at::Tensor& gradient) {
  return wanted ? gradient : at::Tensor();
}

}  // namespace torchmoe

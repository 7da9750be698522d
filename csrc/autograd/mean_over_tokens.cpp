// A mean is linear, so that the derivative of its backward is the mean again.
#include "ops/mean_over_tokens.h"

#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

using TokenMask = std::optional<at::Tensor>;

variable_list mean_over_tokens_gradient(const Arriving& arriving,
                                        const TokenMask& token_mask,
                                        const c10::SymInt& num_tokens,
                                        at::ScalarType dtype) {
  return {mean_over_tokens_backward(arriving.grads[0], num_tokens, token_mask).to(dtype)};
}

at::Tensor mean_over_tokens_autograd(const at::Tensor& values, const TokenMask& token_mask) {
  check_mean_over_tokens(values, token_mask);
  const auto means = below_autograd([&] { return mean_over_tokens(values, token_mask); });
  record_node<&mean_over_tokens_gradient>("mean_over_tokens",
                                          {means},
                                          std::tie(values),
                                          token_mask,
                                          values.sym_size(-2),
                                          values.scalar_type());
  if (has_tangent(values)) {
    set_tangent(means, mean_over_tokens(tangent_of(values), token_mask));
  }
  return means;
}

variable_list mean_over_tokens_second_gradient(const Arriving& arriving,
                                               const TokenMask& token_mask,
                                               at::ScalarType dtype) {
  return {mean_over_tokens(arriving.grads[0], token_mask).to(dtype)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
at::Tensor mean_over_tokens_backward_autograd(const at::Tensor& grad,
                                              c10::SymInt num_tokens,
                                              const TokenMask& token_mask) {
  // NOLINTEND(performance-unnecessary-value-param)
  check_mean_over_tokens_backward(grad, num_tokens, token_mask);
  const auto values =
      below_autograd([&] { return mean_over_tokens_backward(grad, num_tokens, token_mask); });
  record_node<&mean_over_tokens_second_gradient>(
      "mean_over_tokens_backward", {values}, std::tie(grad), token_mask, grad.scalar_type());
  if (has_tangent(grad)) {
    set_tangent(values, mean_over_tokens_backward(tangent_of(grad), num_tokens, token_mask));
  }
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("mean_over_tokens", &mean_over_tokens_autograd);
  m.impl("_mean_over_tokens_backward", &mean_over_tokens_backward_autograd);
}

}  // namespace torchmoe

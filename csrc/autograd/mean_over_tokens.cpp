// A mean is linear, so that the derivative of its backward is the mean again.
#include "ops/mean_over_tokens.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void save_mask(AutogradContext* ctx, const std::optional<at::Tensor>& token_mask) {
  ctx->save_for_backward(token_mask ? variable_list{*token_mask} : variable_list{});
}

std::optional<at::Tensor> saved_mask(AutogradContext* ctx) {
  const auto saved = ctx->get_saved_variables();
  return saved.empty() ? std::nullopt : std::optional(saved[0]);
}

class MeanOverTokens : public torch::autograd::Function<MeanOverTokens> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& values,
                            const std::optional<at::Tensor>& token_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_mask(ctx, token_mask);
    const auto means = mean_over_tokens(values, token_mask);
    ctx->saved_data["num_tokens"] = values.sym_size(-2);
    ctx->saved_data["dtype"] = values.scalar_type();
    return means;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto grad_values = mean_over_tokens_backward(
        grads[0], ctx->saved_data["num_tokens"].toSymInt(), saved_mask(ctx));
    return {grad_values.to(ctx->saved_data["dtype"].toScalarType()), at::Tensor()};
  }
};

class MeanOverTokensBackward : public torch::autograd::Function<MeanOverTokensBackward> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& grad,
                            const c10::SymInt& num_tokens,
                            const std::optional<at::Tensor>& token_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_mask(ctx, token_mask);
    ctx->saved_data["dtype"] = grad.scalar_type();
    return mean_over_tokens_backward(grad, num_tokens, token_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto grad = mean_over_tokens(grads[0], saved_mask(ctx));
    return {grad.to(ctx->saved_data["dtype"].toScalarType()), at::Tensor(), at::Tensor()};
  }
};

at::Tensor mean_over_tokens_autograd(const at::Tensor& values,
                                     const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens(values, token_mask);
  refuse_tangents("mean_over_tokens", values);
  return MeanOverTokens::apply(values, token_mask);
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
at::Tensor mean_over_tokens_backward_autograd(const at::Tensor& grad,
                                              c10::SymInt num_tokens,
                                              const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens_backward(grad, num_tokens, token_mask);
  refuse_tangents("mean_over_tokens", grad);
  return MeanOverTokensBackward::apply(grad, num_tokens, token_mask);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("mean_over_tokens", &mean_over_tokens_autograd);
  m.impl("_mean_over_tokens_backward", &mean_over_tokens_backward_autograd);
}

}  // namespace torchmoe

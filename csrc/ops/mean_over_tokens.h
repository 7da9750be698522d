#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The mean over counted tokens, in an order of summation that does not depend on the number of
/// threads, unlike torch's own mean. A router's losses and statistics are built on it.
///
///     mean[..., c] = sum over counted t of values[..., t, c] / number of counted t
///
/// values [..., T, C] floating, leading dimensions independent; token_mask [..., T] bool, true =
/// the token counts; the values of other tokens are ignored, NaN included -> [..., C], float32
/// (float64 for float64), summed in float64; 0 where no token counts. Linear, so differentiable in
/// values to any order.
at::Tensor mean_over_tokens(const at::Tensor& values,
                            const std::optional<at::Tensor>& token_mask = std::nullopt);

/// Gradient of values [..., num_tokens, C] for grad [..., C], in grad's dtype.
at::Tensor mean_over_tokens_backward(const at::Tensor& grad,
                                     c10::SymInt num_tokens,
                                     const std::optional<at::Tensor>& token_mask);

void check_mean_over_tokens(const at::Tensor& values, const std::optional<at::Tensor>& token_mask);
void check_mean_over_tokens_backward(const at::Tensor& grad,
                                     const c10::SymInt& num_tokens,
                                     const std::optional<at::Tensor>& token_mask);

}  // namespace torchmoe

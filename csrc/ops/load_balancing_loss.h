#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The load-balancing loss of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equation
/// 4), without its coefficient:
///
///     E * sum_i fraction_i * P_i,   P_i = mean over counted tokens of p[t, i] / sum_e p[t, e]
///     p = score_function(logits)
///
/// The quotient is formed from logarithms where p underflows. The loss is exactly 1 when fraction
/// or P is uniform, and E when K = 1 and all tokens choose one expert with certainty. Leading
/// dimensions are independent; the result is the mean over those that have a counted token, so that
/// padding changes nothing, and 0 if none has.
///
/// logits [..., T, E] floating; fraction [..., E] floating, each expert's share of the slots;
/// token_mask [..., T] bool, true = the token counts -> scalar, float32 (float64 for float64
/// logits). Differentiable in logits, to any order and in both modes; fraction carries no gradient
/// and no tangent.
at::Tensor load_balancing_loss(const at::Tensor& logits,
                               const at::Tensor& fraction,
                               std::string_view score_function,
                               const std::optional<at::Tensor>& token_mask = std::nullopt);

/// Gradient of logits for the scalar `grad`.
at::Tensor load_balancing_loss_backward(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const std::optional<at::Tensor>& token_mask);

void check_load_balancing_loss(const at::Tensor& logits,
                               const at::Tensor& fraction,
                               std::string_view score_function,
                               const std::optional<at::Tensor>& token_mask);
void check_load_balancing_loss_backward(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const std::optional<at::Tensor>& token_mask);

}  // namespace torchmoe

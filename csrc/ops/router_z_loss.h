#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The router z-loss (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, equation 5), without its
/// coefficient:
///
///     mean over counted tokens of logsumexp(logits_t)^2
///
/// logits [..., E] floating, all leading dimensions pooled; token_mask [...] bool, true = the token
/// counts -> scalar, float32 (float64 for float64); 0 when no token counts. Differentiable in
/// logits, to any order and in both modes.
at::Tensor router_z_loss(const at::Tensor& logits,
                         const std::optional<at::Tensor>& token_mask = std::nullopt);

/// Gradient of logits for the scalar `grad`.
at::Tensor router_z_loss_backward(const at::Tensor& grad,
                                  const at::Tensor& logits,
                                  const std::optional<at::Tensor>& token_mask);

void check_router_z_loss(const at::Tensor& logits, const std::optional<at::Tensor>& token_mask);
void check_router_z_loss_backward(const at::Tensor& grad,
                                  const at::Tensor& logits,
                                  const std::optional<at::Tensor>& token_mask);

}  // namespace torchmoe

#pragma once

#include <array>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The router's linear map, formed in float32 whatever the input type (float64 for float64):
///
///     logits[t, e] = sum_h x[t, h] * weight[e, h] + bias[e]
///
/// x [T, H], weight [E, H], bias [E], all of one floating dtype -> logits [T, E].
/// Differentiable in x, weight and bias, to any order and in both modes.
at::Tensor router_logits(const at::Tensor& x,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias = std::nullopt);

/// Gradients of x, weight and bias for `grad` [T, E]; one that output_mask leaves out is an empty
/// tensor of shape [0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask);

void check_router_logits(const at::Tensor& x,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias);
void check_router_logits_backward(const at::Tensor& grad,
                                  const at::Tensor& x,
                                  const at::Tensor& weight);

}  // namespace torchmoe

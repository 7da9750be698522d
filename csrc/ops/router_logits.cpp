#include "ops/router_logits.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/output_mask.h"

namespace torchmoe {

at::Tensor router_logits(const at::Tensor& x,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  static const auto op = find_op<decltype(router_logits)>("torchmoe::router_logits");
  return op.call(x, weight, bias);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  static const auto op =
      find_op<decltype(router_logits_backward)>("torchmoe::_router_logits_backward");
  return op.call(grad, x, weight, output_mask);
}

void check_router_logits(const at::Tensor& x,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  constexpr auto op = "router_logits";
  check_dim(op, "x", x, 2, "[num_tokens, hidden_size]");
  check_floating(op, "x", x);
  check_dim(op, "weight", weight, 2, "[num_experts, hidden_size]");
  check_shape(
      op, "weight", weight, {weight.sym_size(0), x.sym_size(1)}, "[num_experts, hidden_size]");
  // The weight is the layer's and x the caller's, so that x is what is of another type.
  check_floating(op, "weight", weight);
  check_same_dtype(op, "x", x, "weight", weight);
  check_same_device(op, "weight", weight, "x", x);
  if (bias) {
    check_shape(op, "bias", *bias, {weight.sym_size(0)}, "[num_experts]");
    check_same_dtype(op, "bias", *bias, "x", x);
    check_same_device(op, "bias", *bias, "x", x);
  }
}

void check_router_logits_backward(const at::Tensor& grad,
                                  const at::Tensor& x,
                                  const at::Tensor& weight) {
  check_router_logits(x, weight, std::nullopt);
  constexpr auto op = "_router_logits_backward";
  check_shape(op, "grad", grad, {x.sym_size(0), weight.sym_size(0)}, "[num_tokens, num_experts]");
  check_gradient(op, grad, "x", x);
}

namespace {

at::Tensor router_logits_meta(const at::Tensor& x,
                              const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias) {
  check_router_logits(x, weight, bias);
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)},
                          x.options().dtype(accumulate_dtype(x.scalar_type())));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward_meta(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad, x, weight);
  return {empty_if(output_mask[0], x.sym_sizes(), x.options()),
          empty_if(output_mask[1], weight.sym_sizes(), weight.options()),
          empty_if(output_mask[2], {weight.sym_size(0)}, weight.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("router_logits", &router_logits_meta);
  m.impl("_router_logits_backward", &router_logits_backward_meta);
}

}  // namespace torchmoe

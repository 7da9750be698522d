#include "ops/router_z_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/token_mask.h"

namespace torchmoe {

at::Tensor router_z_loss(const at::Tensor& logits, const std::optional<at::Tensor>& token_mask) {
  static const auto op = find_op<decltype(router_z_loss)>("torchmoe::router_z_loss");
  return op.call(logits, token_mask);
}

at::Tensor router_z_loss_backward(const at::Tensor& grad,
                                  const at::Tensor& logits,
                                  const std::optional<at::Tensor>& token_mask) {
  static const auto op =
      find_op<decltype(router_z_loss_backward)>("torchmoe::_router_z_loss_backward");
  return op.call(grad, logits, token_mask);
}

void check_router_z_loss(const at::Tensor& logits, const std::optional<at::Tensor>& token_mask) {
  constexpr auto op = "router_z_loss";
  check_floating(op, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1 && logits.sym_size(-1) >= 1,
              op,
              ": logits must be [..., num_experts] with at least one expert, got shape ",
              logits.sym_sizes());
  check_token_mask(op, token_mask, "logits", logits);
}

void check_router_z_loss_backward(const at::Tensor& grad,
                                  const at::Tensor& logits,
                                  const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(logits, token_mask);
  constexpr auto op = "_router_z_loss_backward";
  check_dim(op, "grad", grad, 0, "a scalar");
  check_gradient(op, grad, "logits", logits);
}

namespace {

at::Tensor router_z_loss_meta(const at::Tensor& logits,
                              const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(logits, token_mask);
  return at::empty({}, logits.options().dtype(accumulate_dtype(logits.scalar_type())));
}

at::Tensor router_z_loss_backward_meta(const at::Tensor& grad,
                                       const at::Tensor& logits,
                                       const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad, logits, token_mask);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("router_z_loss", &router_z_loss_meta);
  m.impl("_router_z_loss_backward", &router_z_loss_backward_meta);
}

}  // namespace torchmoe

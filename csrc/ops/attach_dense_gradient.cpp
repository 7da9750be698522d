#include "ops/attach_dense_gradient.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 const ExpertActivation& activation) {
  static const auto op =
      find_op<decltype(attach_dense_gradient)>("torchmoe::attach_dense_gradient");
  return call(op, y, probs, x, experts, activation);
}

at::Tensor attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation) {
  static const auto op = find_op<decltype(attach_dense_gradient_backward)>(
      "torchmoe::_attach_dense_gradient_backward");
  return call(op, grad, x, experts, activation);
}

namespace {

/// y and its gradient have one shape.
void check_like_x(std::string_view op,
                  std::string_view name,
                  const at::Tensor& tensor,
                  const at::Tensor& x) {
  check_floating(op, name, tensor);
  check_shape(op, name, tensor, {x.sym_size(0), x.sym_size(1)}, "[num_tokens, hidden_size]");
  check_same_device(op, name, tensor, "x", x);
}

}  // namespace

void check_attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 const ExpertActivation& activation) {
  constexpr auto op = "attach_dense_gradient";
  check_expert_parameters(op, "x", x, experts, activation);
  check_like_x(op, "y", y, x);
  check_shape(
      op, "probs", probs, {x.sym_size(0), experts.w_out.sym_size(0)}, "[num_tokens, num_experts]");
  check_floating(op, "probs", probs);
  check_same_device(op, "probs", probs, "x", x);
}

void check_attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation) {
  constexpr auto op = "_attach_dense_gradient_backward";
  check_expert_parameters(op, "x", x, experts, activation);
  check_like_x(op, "grad", grad, x);
}

namespace {

at::Tensor attach_dense_gradient_composite(const at::Tensor& y,
                                           const at::Tensor& probs,
                                           const at::Tensor& x,
                                           const ExpertParameters& experts,
                                           const ExpertActivation& activation) {
  check_attach_dense_gradient(y, probs, x, experts, activation);
  return at::clone(y);
}

at::Tensor attach_dense_gradient_backward_meta(const at::Tensor& grad,
                                               const at::Tensor& x,
                                               const ExpertParameters& experts,
                                               const ExpertActivation& activation) {
  check_attach_dense_gradient_backward(grad, x, experts, activation);
  return at::empty_symint({x.sym_size(0), experts.w_out.sym_size(0)},
                          x.options().dtype(accumulate_dtype(experts.w_in.scalar_type())));
}

}  // namespace

// A copy is the same on every backend, Meta included.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("attach_dense_gradient", with_records<&attach_dense_gradient_composite>);
}

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("_attach_dense_gradient_backward", with_records<&attach_dense_gradient_backward_meta>);
}

}  // namespace torchmoe

#include "ops/scale_gradient.h"

#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale) {
  static const auto op = find_op<decltype(scale_gradient)>("torchmoe::scale_gradient");
  return op.call(x, scale);
}

void check_scale_gradient(const at::Tensor& x, const at::Tensor& scale) {
  constexpr auto op = "scale_gradient";
  check_floating(op, "x", x);
  check_floating(op, "scale", scale);
  check_same_device(op, "scale", scale, "x", x);
  bool broadcasts = scale.dim() <= x.dim();
  for (int64_t i = 1; broadcasts && i <= scale.dim(); ++i) {
    broadcasts = scale.sym_size(-i) == x.sym_size(-i) || scale.sym_size(-i) == 1;
  }
  TORCH_CHECK(broadcasts,
              op,
              ": scale must broadcast to x's shape ",
              x.sym_sizes(),
              ", got shape ",
              scale.sym_sizes());
}

namespace {

at::Tensor scale_gradient_composite(const at::Tensor& x, const at::Tensor& scale) {
  check_scale_gradient(x, scale);
  return at::clone(x);
}

}  // namespace

// A copy is the same on every backend, Meta included.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("scale_gradient", &scale_gradient_composite);
}

}  // namespace torchmoe

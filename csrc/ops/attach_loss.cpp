#include "ops/attach_loss.h"

#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor attach_loss(const at::Tensor& x, const at::Tensor& loss, double scale) {
  static const auto op = find_op<decltype(attach_loss)>("torchmoe::attach_loss");
  return op.call(x, loss, scale);
}

void check_attach_loss(const at::Tensor& x, const at::Tensor& loss) {
  constexpr auto op = "attach_loss";
  check_floating(op, "x", x);
  check_dim(op, "loss", loss, 0, "a scalar");
  check_floating(op, "loss", loss);
}

namespace {

at::Tensor attach_loss_composite(const at::Tensor& x, const at::Tensor& loss, double /*scale*/) {
  check_attach_loss(x, loss);
  return at::clone(x);
}

}  // namespace

// A copy is the same on every backend, Meta included.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("attach_loss", &attach_loss_composite);
}

}  // namespace torchmoe

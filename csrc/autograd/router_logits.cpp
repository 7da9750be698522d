#include "ops/router_logits.h"

#include <torch/library.h>

#include "autograd/affine.h"

namespace torchmoe {

namespace {

struct RouterLogits {
  static constexpr auto kName = "router_logits";
  static constexpr auto check = &check_router_logits;
  static constexpr auto check_gradients = &check_router_logits_backward;
  static constexpr auto out = &router_logits;
  static constexpr auto gradients = &router_logits_backward;

  static at::Tensor biases(const at::Tensor& bias, const at::Tensor& out) {
    return bias.to(out.scalar_type()).expand_as(out);
  }
};

using RouterLogitsDerivatives = Affine<RouterLogits>;

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("router_logits", &RouterLogitsDerivatives::out);
  m.impl("_router_logits_backward", &RouterLogitsDerivatives::gradients);
}

}  // namespace torchmoe

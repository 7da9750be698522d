#include "autograd/activate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include "common/activation.h"
#include "common/dtypes.h"

namespace torchmoe {

template <>
struct ConstantOf<at::Tensor> {
  using Type = double;
};

template <>
// NOLINTNEXTLINE(performance-unnecessary-value-param): the template takes scalars
at::Tensor Factor<Nonlinearity::relu>::value(at::Tensor u) {
  return at::gt(u, 0).to(u.scalar_type());
}

namespace {

at::Tensor softcap(const at::Tensor& x, const std::optional<double>& cap) {
  return cap ? *cap * at::tanh(x / *cap) : x;
}

/// softcap(g) s(alpha g), and f(g) itself where that is all.
at::Tensor gate_of(const ChosenActivation& chosen,
                   const ExpertActivation& activation,
                   const at::Tensor& pre) {
  const auto gate = activation.limit ? at::clamp_max(pre, *activation.limit) : pre;
  const bool is_plain = activation.alpha == 1 && !activation.gate_softcap;
  at::Tensor value;
  with_nonlinearity(chosen.f(), [&](auto formula) {
    value = is_plain ? formula.value(gate)
                     : softcap(gate, activation.gate_softcap) *
                           decltype(formula)::FactorOf::value(activation.alpha * gate);
  });
  return value;
}

at::Tensor up_of(const ExpertActivation& activation, const at::Tensor& pre) {
  const auto up = activation.limit ? at::clamp(pre, -*activation.limit, *activation.limit) : pre;
  const auto bent = softcap(up, activation.up_softcap);
  return activation.up_offset == 0 ? bent : bent + activation.up_offset;
}

}  // namespace

at::Tensor activate(const at::Tensor& pre, const ExpertActivation& activation) {
  const auto chosen = choose_activation("expert_mlp", activation);
  const auto wide = pre.to(accumulate_dtype(pre.scalar_type()));
  if (!chosen.is_gated()) {
    return gate_of(chosen, activation, wide).to(pre.scalar_type());
  }
  const auto width = wide.sym_size(1) / 2;
  const auto pairs = chosen.is_interleaved()
                         ? wide.view_symint({wide.sym_size(0), width, 2}).unbind(2)
                         : wide.chunk(2, 1);
  const auto activated = gate_of(chosen, activation, pairs[0]) * up_of(activation, pairs[1]);
  return activated.to(pre.scalar_type());
}

}  // namespace torchmoe

#include "autograd/activate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/vocabulary.h"

namespace torchmoe {

template <>
struct ConstantOf<at::Tensor> {
  using Type = double;
};

at::Tensor activate(const at::Tensor& pre, std::string_view activation) {
  const auto chosen = choose<Activation>("expert_mlp", activation);
  const auto wide = pre.to(accumulate_dtype(pre.scalar_type()));
  const auto halves = is_gated(chosen) ? wide.chunk(2, 1) : std::vector{wide};
  at::Tensor activated;
  with_nonlinearity(nonlinearity_of(chosen),
                    [&](auto formula) { activated = formula.value(halves[0]); });
  if (is_gated(chosen)) {
    activated = activated * halves[1];
  }
  return activated.to(pre.scalar_type());
}

}  // namespace torchmoe

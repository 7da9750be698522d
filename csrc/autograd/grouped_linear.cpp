#include "ops/grouped_linear.h"

#include <torch/library.h>

#include "autograd/affine.h"
#include "ops/sum_by_expert.h"

namespace torchmoe {

namespace {

struct GroupedLinear {
  static constexpr auto kName = "grouped_linear";
  static constexpr auto check = &check_grouped_linear;
  static constexpr auto check_gradients = &check_grouped_linear_backward;
  static constexpr auto out = &grouped_linear;
  static constexpr auto gradients = &grouped_linear_backward;

  /// The adjoint of the sum over an expert's rows, which its bias's gradient is.
  static at::Tensor biases(const at::Tensor& of_experts,
                           const at::Tensor& out,
                           const at::Tensor& expert_offsets) {
    return sum_by_expert_backward(of_experts, expert_offsets, out.sym_size(0));
  }
};

using GroupedLinearDerivatives = Affine<GroupedLinear, const at::Tensor&>;

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("grouped_linear", &GroupedLinearDerivatives::out);
  m.impl("_grouped_linear_backward", &GroupedLinearDerivatives::gradients);
}

}  // namespace torchmoe

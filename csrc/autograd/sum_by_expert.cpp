// The sum is linear in the rows, so that the derivative of its backward is the sum again.
#include "ops/sum_by_expert.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class SumByExpert : public torch::autograd::Function<SumByExpert> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& rows,
                            const at::Tensor& expert_offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({expert_offsets});
    ctx->saved_data["num_rows"] = rows.sym_size(0);
    return sum_by_expert(rows, expert_offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {sum_by_expert_backward(
                grads[0], ctx->get_saved_variables()[0], ctx->saved_data["num_rows"].toSymInt()),
            at::Tensor()};
  }
};

class SumByExpertBackward : public torch::autograd::Function<SumByExpertBackward> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& grad,
                            const at::Tensor& expert_offsets,
                            c10::SymInt num_rows) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({expert_offsets});
    return sum_by_expert_backward(grad, expert_offsets, std::move(num_rows));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {sum_by_expert(grads[0], ctx->get_saved_variables()[0]), at::Tensor(), at::Tensor()};
  }
};

at::Tensor sum_by_expert_autograd(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  check_sum_by_expert(rows, expert_offsets);
  refuse_tangents("sum_by_expert", rows);
  return SumByExpert::apply(rows, expert_offsets);
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
at::Tensor sum_by_expert_backward_autograd(const at::Tensor& grad,
                                           const at::Tensor& expert_offsets,
                                           c10::SymInt num_rows) {
  // NOLINTEND(performance-unnecessary-value-param)
  check_sum_by_expert_backward(grad, expert_offsets, num_rows);
  refuse_tangents("sum_by_expert", grad);
  return SumByExpertBackward::apply(grad, expert_offsets, num_rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("sum_by_expert", &sum_by_expert_autograd);
  m.impl("_sum_by_expert_backward", &sum_by_expert_backward_autograd);
}

}  // namespace torchmoe

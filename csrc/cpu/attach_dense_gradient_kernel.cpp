// Every expert once for every token, and nothing kept of it except one scalar each.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/tensors.h"
#include "cpu/activation_block.h"
#include "cpu/expert_matrices.h"
#include "cpu/gemm/tasks.h"
#include "cpu/rows.h"
#include "ops/attach_dense_gradient.h"

namespace torchmoe {

namespace {

// Tokens that a task takes through one expert: enough to amortise the product's packing of the
// expert's matrices, few enough that what lies between the products stays in the cache.
constexpr int64_t kTokensPerTask = 128;

/// One expert's column of a [T, E] array.
template <typename Acc>
struct Column {
  Acc* data;
  int64_t stride;
};

/// grad_probs of token t = <grad[t], expert(x[t])> for a block of tokens: with a = activation(w_in x +
/// b_in) it is <grad w_out, a> + <grad, b_out>, so that the expert's output is never formed.
template <typename T, typename Acc>
void dot_with_outputs(const ChosenActivation& activation,
                      const cpu::ExpertMatrices<const T>& expert,
                      const cpu::Rows<T>& x,
                      const cpu::Rows<T>& grad,
                      const Column<Acc>& grad_probs,
                      int64_t num_tokens,
                      const cpu::ExpertShape& shape,
                      cpu::Workspace& workspace) {
  const int64_t hidden = shape.hidden;
  const int64_t width = shape.intermediate;
  std::vector<T> act(num_tokens * width);
  cpu::ActivationBlock<T, Acc> target{};
  target.rows = num_tokens;
  target.columns = width;
  target.act = act.data();
  target.act_stride = width;
  const cpu::InputColumns<T> input{expert.w_in, expert.b_in, /*column=*/0, width};
  cpu::activated_product(activation, x, input, hidden, target, workspace);
  Acc* grad_act = workspace.gate.get<Acc>(num_tokens * width);
  cpu::times(grad, expert.w_out, {num_tokens, width, hidden}, grad_act, width, workspace);
  for (int64_t t = 0; t < num_tokens; ++t) {
    Acc sum = cpu::dot<Acc>(grad_act + t * width, act.data() + t * width, width);
    if (expert.b_out != nullptr) {
      sum += cpu::dot<Acc>(grad.row(t), expert.b_out, hidden);
    }
    grad_probs.data[t * grad_probs.stride] = sum;
  }
}

template <typename T, typename Acc>
void dot_with_every_output(const ChosenActivation& activation,
                           const cpu::ExpertMatrices<const T>& matrices,
                           const cpu::Rows<T>& x,
                           const cpu::Rows<T>& grad,
                           Acc* grad_probs,
                           int64_t num_tokens,
                           int64_t num_experts,
                           const cpu::ExpertShape& shape) {
  cpu::Phase tasks;
  for (int64_t e = 0; e < num_experts; ++e) {
    const auto expert = cpu::of_expert(matrices, e, shape);
    for (int64_t begin = 0; begin < num_tokens; begin += kTokensPerTask) {
      tasks.push_back([=, &activation, &shape](cpu::Workspace& workspace) {
        dot_with_outputs(activation,
                         expert,
                         x.from(begin, 0),
                         grad.from(begin, 0),
                         Column<Acc>{grad_probs + begin * num_experts + e, num_experts},
                         std::min(kTokensPerTask, num_tokens - begin),
                         shape,
                         workspace);
      });
    }
  }
  cpu::run(std::move(tasks), num_tokens * num_experts * shape.multiplications());
}

at::Tensor attach_dense_gradient_backward_kernel(const at::Tensor& grad,
                                                 const at::Tensor& x,
                                                 const ExpertParameters& experts,
                                                 const ExpertActivation& given_activation) {
  check_attach_dense_gradient_backward(grad, x, experts, given_activation);
  const auto activation = choose_activation("attach_dense_gradient", given_activation);
  const auto shape = cpu::shape_of(experts);
  const auto dtype = experts.w_in.scalar_type();
  const auto grad_c = contiguous_as(grad, dtype);
  const auto x_c = contiguous_as(x, dtype);
  const auto experts_c = cpu::readable(experts);
  const int64_t num_experts = experts.w_out.size(0);
  auto grad_probs = at::empty({x.size(0), num_experts}, x.options().dtype(accumulate_dtype(dtype)));
  with_float_type(dtype, [&]<typename scalar_t>() {
    dot_with_every_output(activation,
                          cpu::matrices_of<scalar_t>(experts_c),
                          cpu::Rows<scalar_t>{x_c.const_data_ptr<scalar_t>(), shape.hidden},
                          cpu::Rows<scalar_t>{grad_c.const_data_ptr<scalar_t>(), shape.hidden},
                          grad_probs.mutable_data_ptr<at::opmath_type<scalar_t>>(),
                          x.size(0),
                          num_experts,
                          shape);
  });
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_attach_dense_gradient_backward", with_records<&attach_dense_gradient_backward_kernel>);
}

}  // namespace torchmoe

// Every expert once for every token, and nothing kept of it but one number each.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
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

/// grad_probs[t * num_experts] = <grad[t], expert(x[t])> for a block of tokens: with a = activation(w_in x +
/// b_in) it is <grad w_out, a> + <grad, b_out>, so that the expert's output is never formed.
template <typename T, typename Acc>
void dot_with_outputs(Activation activation,
                      const cpu::ExpertMatrices<const T>& expert,
                      const cpu::Rows<T>& x,
                      const cpu::Rows<T>& grad,
                      Acc* grad_probs,
                      int64_t num_tokens,
                      int64_t num_experts,
                      const cpu::ExpertShape& shape,
                      cpu::Workspace& workspace) {
  const int64_t hidden = shape.hidden;
  const int64_t width = shape.intermediate;
  std::vector<Acc> act(num_tokens * width);
  cpu::ActivationBlock<T, Acc> target{};
  target.rows = num_tokens;
  target.columns = width;
  target.act = act.data();
  target.act_stride = width;
  const auto matrix =
      cpu::input_matrix(activation, expert.w_in, expert.b_in, /*column=*/0, width, hidden);
  cpu::activated_product(activation, x, matrix, hidden, target, workspace);
  Acc* grad_act = workspace.gate.get<Acc>(num_tokens * width);
  cpu::product(cpu::Form::nn,
               grad,
               cpu::Rows<T>{expert.w_out, width},
               {num_tokens, width, hidden},
               grad_act,
               width,
               workspace);
  for (int64_t t = 0; t < num_tokens; ++t) {
    Acc sum = cpu::dot<Acc>(grad_act + t * width, act.data() + t * width, width);
    if (expert.b_out != nullptr) {
      sum += cpu::dot<Acc>(grad.row(t), expert.b_out, hidden);
    }
    grad_probs[t * num_experts] = sum;
  }
}

template <typename T, typename Acc>
void dot_with_every_output(Activation activation,
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
      tasks.push_back([=, &shape](cpu::Workspace& workspace) {
        dot_with_outputs(activation,
                         expert,
                         x.from(begin, 0),
                         grad.from(begin, 0),
                         grad_probs + begin * num_experts + e,
                         std::min(kTokensPerTask, num_tokens - begin),
                         num_experts,
                         shape,
                         workspace);
      });
    }
  }
  cpu::run(std::move(tasks), num_tokens * num_experts * shape.multiplications());
}

at::Tensor attach_dense_gradient_backward_kernel(const at::Tensor& grad,
                                                 const at::Tensor& x,
                                                 const at::Tensor& w_in,
                                                 const std::optional<at::Tensor>& b_in,
                                                 const at::Tensor& w_out,
                                                 const std::optional<at::Tensor>& b_out,
                                                 std::string_view activation_name) {
  check_attach_dense_gradient_backward(grad, x, w_in, b_in, w_out, b_out, activation_name);
  const auto activation = choose_activation("attach_dense_gradient", activation_name);
  const cpu::ExpertShape shape{x.size(1), w_out.size(2), w_in.size(1)};
  const auto grad_c = contiguous_as(grad, x.scalar_type());
  const auto x_c = x.contiguous();
  const auto w_in_c = w_in.contiguous();
  const auto b_in_c = contiguous(b_in);
  const auto w_out_c = w_out.contiguous();
  const auto b_out_c = contiguous(b_out);
  auto grad_probs =
      at::empty({x.size(0), w_out.size(0)}, x.options().dtype(accumulate_dtype(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "attach_dense_gradient_backward", [&] {
        const cpu::ExpertMatrices<const scalar_t> matrices{w_in_c.const_data_ptr<scalar_t>(),
                                                           data_or_null<scalar_t>(b_in_c),
                                                           w_out_c.const_data_ptr<scalar_t>(),
                                                           data_or_null<scalar_t>(b_out_c)};
        dot_with_every_output(activation,
                              matrices,
                              cpu::Rows<scalar_t>{x_c.const_data_ptr<scalar_t>(), shape.hidden},
                              cpu::Rows<scalar_t>{grad_c.const_data_ptr<scalar_t>(), shape.hidden},
                              grad_probs.mutable_data_ptr<at::opmath_type<scalar_t>>(),
                              x.size(0),
                              w_out.size(0),
                              shape);
      });
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_attach_dense_gradient_backward", &attach_dense_gradient_backward_kernel);
}

}  // namespace torchmoe

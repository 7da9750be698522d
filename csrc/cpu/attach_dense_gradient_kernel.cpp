// Every expert once for every token, and nothing kept of it but one number each.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/activation_block.h"
#include "cpu/gemm/blocks.h"
#include "cpu/gemm/tasks.h"
#include "cpu/rows.h"
#include "ops/attach_dense_gradient.h"

namespace torchmoe {

namespace {

// Tokens that a task takes through one expert: enough to amortise the product's packing of the
// expert's matrices, few enough that what lies between the products stays in the cache.
constexpr int64_t kTokensPerTask = 128;

struct Sizes {
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t experts;
};

/// Every expert's matrices; the biases may be null.
template <typename T>
struct EveryExpert {
  const T* w_in;
  const T* b_in;
  const T* w_out;
  const T* b_out;
};

/// grad_probs[t, e] = <grad[t], expert e(x[t])> for a block of tokens: with a = activation(w_in x +
/// b_in) it is <grad w_out, a> + <grad, b_out>, so that the expert's output is never formed.
template <typename T, typename Acc>
void dot_with_outputs(Activation activation,
                      const EveryExpert<T>& matrices,
                      const T* x,
                      const T* grad,
                      Acc* grad_probs,
                      int64_t e,
                      const cpu::Range& tokens,
                      const Sizes& sizes,
                      cpu::Workspace& workspace) {
  const int64_t hidden = sizes.hidden;
  const int64_t width = sizes.intermediate;
  const auto x_rows = cpu::Rows<T>{x, hidden}.from(tokens.begin, 0);
  const auto grad_rows = cpu::Rows<T>{grad, hidden}.from(tokens.begin, 0);
  std::vector<Acc> act(tokens.size() * width);
  cpu::ActivationBlock<T, Acc> target{};
  target.rows = tokens.size();
  target.columns = width;
  target.act = act.data();
  target.act_stride = width;
  const int64_t pre_width = is_gated(activation) ? 2 * width : width;
  const T* b_in = matrices.b_in == nullptr ? nullptr : matrices.b_in + e * pre_width;
  const auto matrix = cpu::input_matrix(
      activation, matrices.w_in + e * pre_width * hidden, b_in, /*column=*/0, width, hidden);
  cpu::activated_product(activation, x_rows, matrix, hidden, target, workspace);
  Acc* grad_act = workspace.gate.get<Acc>(tokens.size() * width);
  cpu::product(cpu::Form::nn,
               grad_rows,
               cpu::Rows<T>{matrices.w_out + e * hidden * width, width},
               {tokens.size(), width, hidden},
               grad_act,
               width,
               workspace);
  for (int64_t t = 0; t < tokens.size(); ++t) {
    Acc sum = cpu::dot<Acc>(grad_act + t * width, act.data() + t * width, width);
    if (matrices.b_out != nullptr) {
      sum += cpu::dot<Acc>(grad_rows.row(t), matrices.b_out + e * hidden, hidden);
    }
    grad_probs[(tokens.begin + t) * sizes.experts + e] = sum;
  }
}

template <typename T, typename Acc>
void dot_with_every_output(Activation activation,
                           const EveryExpert<T>& matrices,
                           const T* x,
                           const T* grad,
                           Acc* grad_probs,
                           const Sizes& sizes) {
  cpu::Phase tasks;
  for (int64_t e = 0; e < sizes.experts; ++e) {
    for (int64_t begin = 0; begin < sizes.tokens; begin += kTokensPerTask) {
      const cpu::Range tokens{begin, std::min(begin + kTokensPerTask, sizes.tokens)};
      tasks.push_back([=, &matrices, &sizes](cpu::Workspace& workspace) {
        dot_with_outputs(activation, matrices, x, grad, grad_probs, e, tokens, sizes, workspace);
      });
    }
  }
  cpu::run(std::move(tasks));
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
  const Sizes sizes{x.size(0), x.size(1), w_out.size(2), w_out.size(0)};
  const auto grad_c = contiguous_as(grad, x.scalar_type());
  const auto x_c = x.contiguous();
  const auto w_in_c = w_in.contiguous();
  const auto b_in_c = contiguous(b_in);
  const auto w_out_c = w_out.contiguous();
  const auto b_out_c = contiguous(b_out);
  auto grad_probs = at::empty({sizes.tokens, sizes.experts},
                              x.options().dtype(accumulate_dtype(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "attach_dense_gradient_backward", [&] {
        dot_with_every_output(activation,
                              EveryExpert<scalar_t>{w_in_c.const_data_ptr<scalar_t>(),
                                                    data_or_null<scalar_t>(b_in_c),
                                                    w_out_c.const_data_ptr<scalar_t>(),
                                                    data_or_null<scalar_t>(b_out_c)},
                              x_c.const_data_ptr<scalar_t>(),
                              grad_c.const_data_ptr<scalar_t>(),
                              grad_probs.mutable_data_ptr<at::opmath_type<scalar_t>>(),
                              sizes);
      });
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_attach_dense_gradient_backward", &attach_dense_gradient_backward_kernel);
}

}  // namespace torchmoe

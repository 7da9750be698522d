// Every expert once for every token, and nothing kept of it but one number each.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/activate_rows.h"
#include "cpu/gemm/grouped_product.h"
#include "cpu/parallel.h"
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
  int64_t pre_width;
  int64_t experts;
};

/// One expert's matrices; the biases may be null.
template <typename T>
struct Expert {
  const T* w_in;
  const T* b_in;
  const T* w_out;
  const T* b_out;
};

/// grad_probs[t * E] = <grad[t], expert(x[t])> for a block of tokens: with a = activation(w_in x +
/// b_in) it is <grad w_out, a> + <grad, b_out>, so that the expert's output is never formed.
template <typename T>
void dot_with_outputs(Activation activation,
                      const Expert<T>& expert,
                      const T* x,
                      const T* grad,
                      T* grad_probs,
                      int64_t tokens,
                      const Sizes& sizes) {
  std::vector<T> pre(tokens * sizes.pre_width);
  std::vector<T> act(tokens * sizes.intermediate);
  std::vector<T> grad_act(tokens * sizes.intermediate);
  const cpu::Offsets all{0, tokens};
  cpu::grouped_linear(all, x, expert.w_in, expert.b_in, pre.data(), sizes.hidden, sizes.pre_width);
  cpu::activate_rows(activation, pre.data(), act.data(), tokens, sizes.intermediate);
  cpu::grouped_linear_grad_rows(
      all, grad, expert.w_out, grad_act.data(), sizes.intermediate, sizes.hidden);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t first = t * sizes.intermediate;
    T sum = cpu::dot<T>(grad_act.data() + first, act.data() + first, sizes.intermediate);
    if (expert.b_out != nullptr) {
      sum += cpu::dot<T>(grad + t * sizes.hidden, expert.b_out, sizes.hidden);
    }
    grad_probs[t * sizes.experts] = sum;
  }
}

template <typename T>
void dot_with_every_output(Activation activation,
                           const Expert<T>& experts,
                           const T* x,
                           const T* grad,
                           T* grad_probs,
                           const Sizes& sizes) {
  const int64_t blocks = (sizes.tokens + kTokensPerTask - 1) / kTokensPerTask;
  cpu::parallel_tasks(sizes.experts * blocks, [&](int64_t task) {
    const int64_t e = task / blocks;
    const int64_t begin = task % blocks * kTokensPerTask;
    const int64_t tokens = std::min(kTokensPerTask, sizes.tokens - begin);
    const auto of_expert = [e](const T* data, int64_t size) {
      return data == nullptr ? nullptr : data + e * size;
    };
    const Expert<T> expert{of_expert(experts.w_in, sizes.pre_width * sizes.hidden),
                           of_expert(experts.b_in, sizes.pre_width),
                           of_expert(experts.w_out, sizes.hidden * sizes.intermediate),
                           of_expert(experts.b_out, sizes.hidden)};
    dot_with_outputs(activation,
                     expert,
                     x + begin * sizes.hidden,
                     grad + begin * sizes.hidden,
                     grad_probs + begin * sizes.experts + e,
                     tokens,
                     sizes);
  });
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
  const Sizes sizes{x.size(0), x.size(1), w_out.size(2), w_in.size(1), w_out.size(0)};
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto grad_acc = contiguous_as(grad, acc);
  const auto x_acc = contiguous_as(x, acc);
  const auto w_in_acc = contiguous_as(w_in, acc);
  const auto b_in_acc = contiguous_as(b_in, acc);
  const auto w_out_acc = contiguous_as(w_out, acc);
  const auto b_out_acc = contiguous_as(b_out, acc);
  auto grad_probs = at::empty({sizes.tokens, sizes.experts}, x.options().dtype(acc));
  AT_DISPATCH_FLOATING_TYPES(acc, "attach_dense_gradient_backward", [&] {
    const Expert<scalar_t> experts{w_in_acc.const_data_ptr<scalar_t>(),
                                   data_or_null<scalar_t>(b_in_acc),
                                   w_out_acc.const_data_ptr<scalar_t>(),
                                   data_or_null<scalar_t>(b_out_acc)};
    dot_with_every_output(activation,
                          experts,
                          x_acc.const_data_ptr<scalar_t>(),
                          grad_acc.const_data_ptr<scalar_t>(),
                          grad_probs.mutable_data_ptr<scalar_t>(),
                          sizes);
  });
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_attach_dense_gradient_backward", &attach_dense_gradient_backward_kernel);
}

}  // namespace torchmoe

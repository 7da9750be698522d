#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/tasks.h"
#include "ops/router_logits.h"

namespace torchmoe {

namespace {

using cpu::Form;
using cpu::Rows;

// Tokens per task of the products that run along the tokens.
constexpr int64_t kBlockTokens = 256;
// Features per task of the weight's gradient, whose sum runs over all tokens.
constexpr int64_t kBlockFeatures = 64;

struct Sizes {
  int64_t tokens;
  int64_t hidden;
  int64_t experts;

  /// Of any of the three products.
  int64_t multiplications() const { return tokens * hidden * experts; }
};

/// task(begin, size, workspace) for the blocks of [0, size), in parallel.
template <typename Task>
void for_blocks(int64_t size, int64_t block, int64_t multiplications, const Task& task) {
  cpu::Phase tasks;
  for (int64_t begin = 0; begin < size; begin += block) {
    const int64_t count = std::min(block, size - begin);
    tasks.push_back([=, &task](cpu::Workspace& workspace) { task(begin, count, workspace); });
  }
  cpu::run(std::move(tasks), multiplications);
}

/// logits [T, E] = x [T, H] weight [E, H]^T + bias
template <typename T, typename Acc>
void router_logits_kernel_impl(
    const T* x, const T* weight, const T* bias, Acc* logits, const Sizes& sizes) {
  for_blocks(sizes.tokens,
             kBlockTokens,
             sizes.multiplications(),
             [&](int64_t begin, int64_t count, cpu::Workspace& workspace) {
               cpu::product(Form::nt,
                            Rows<T>{x, sizes.hidden}.from(begin, 0),
                            Rows<T>{weight, sizes.hidden},
                            {count, sizes.experts, sizes.hidden},
                            bias,
                            logits + begin * sizes.experts,
                            sizes.experts,
                            workspace);
             });
}

/// grad_x [T, H] = grad [T, E] weight [E, H]
template <typename T, typename Acc>
void grad_x_kernel_impl(const Acc* grad, const T* weight, T* grad_x, const Sizes& sizes) {
  for_blocks(sizes.tokens,
             kBlockTokens,
             sizes.multiplications(),
             [&](int64_t begin, int64_t count, cpu::Workspace& workspace) {
               cpu::product(Form::nn,
                            Rows<Acc>{grad, sizes.experts}.from(begin, 0),
                            Rows<T>{weight, sizes.hidden},
                            {count, sizes.hidden, sizes.experts},
                            /*bias=*/nullptr,
                            grad_x + begin * sizes.hidden,
                            sizes.hidden,
                            workspace);
             });
}

/// grad_weight [E, H] = grad [T, E]^T x [T, H]
template <typename T, typename Acc>
void grad_weight_kernel_impl(const Acc* grad, const T* x, T* grad_weight, const Sizes& sizes) {
  for_blocks(sizes.hidden,
             kBlockFeatures,
             sizes.multiplications(),
             [&](int64_t begin, int64_t count, cpu::Workspace& workspace) {
               cpu::product(Form::tn,
                            Rows<Acc>{grad, sizes.experts},
                            Rows<T>{x, sizes.hidden}.from(0, begin),
                            {sizes.experts, count, sizes.tokens},
                            /*bias=*/nullptr,
                            grad_weight + begin,
                            sizes.hidden,
                            workspace);
             });
}

/// grad_bias [E] = sum of grad [T, E] in token order
template <typename T, typename Acc>
void grad_bias_kernel_impl(const Acc* grad, T* grad_bias, const Sizes& sizes) {
  std::vector<Acc> sums(sizes.experts);
  for (int64_t t = 0; t < sizes.tokens; ++t) {
    for (int64_t e = 0; e < sizes.experts; ++e) {
      sums[e] += grad[t * sizes.experts + e];
    }
  }
  std::copy(sums.begin(), sums.end(), grad_bias);
}

at::Tensor router_logits_kernel(const at::Tensor& x,
                                const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  check_router_logits(x, weight, bias);
  const Sizes sizes{x.size(0), x.size(1), weight.size(0)};
  const auto x_c = x.contiguous();
  const auto weight_c = weight.contiguous();
  const auto bias_c = contiguous(bias);
  auto logits = at::empty({sizes.tokens, sizes.experts},
                          x.options().dtype(accumulate_dtype(x.scalar_type())));
  with_float_type(x.scalar_type(), [&]<typename scalar_t>() {
    router_logits_kernel_impl(x_c.const_data_ptr<scalar_t>(),
                              weight_c.const_data_ptr<scalar_t>(),
                              data_or_null<scalar_t>(bias_c),
                              logits.mutable_data_ptr<at::opmath_type<scalar_t>>(),
                              sizes);
  });
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward_kernel(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad, x, weight);
  const Sizes sizes{x.size(0), x.size(1), weight.size(0)};
  const auto grad_acc = contiguous_as(grad, accumulate_dtype(x.scalar_type()));
  const auto x_c = x.contiguous();
  const auto weight_c = weight.contiguous();
  auto grad_x = empty_if(output_mask[0], x.sym_sizes(), x.options());
  auto grad_weight = empty_if(output_mask[1], weight.sym_sizes(), weight.options());
  auto grad_bias = empty_if(output_mask[2], {weight.sym_size(0)}, weight.options());
  with_float_type(x.scalar_type(), [&]<typename scalar_t>() {
    const auto* g = grad_acc.const_data_ptr<at::opmath_type<scalar_t>>();
    if (output_mask[0]) {
      grad_x_kernel_impl(
          g, weight_c.const_data_ptr<scalar_t>(), grad_x.mutable_data_ptr<scalar_t>(), sizes);
    }
    if (output_mask[1]) {
      grad_weight_kernel_impl(
          g, x_c.const_data_ptr<scalar_t>(), grad_weight.mutable_data_ptr<scalar_t>(), sizes);
    }
    if (output_mask[2]) {
      grad_bias_kernel_impl(g, grad_bias.mutable_data_ptr<scalar_t>(), sizes);
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("router_logits", &router_logits_kernel);
  m.impl("_router_logits_backward", &router_logits_backward_kernel);
}

}  // namespace torchmoe

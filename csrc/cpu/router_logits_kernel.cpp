#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/gemm/product.h"
#include "cpu/parallel.h"
#include "ops/router_logits.h"

namespace torchmoe {

namespace {

using cpu::Matrix;

// Tokens per task of the products that run along the tokens.
constexpr int64_t kBlockTokens = 256;
// Experts per task of the weight's gradient, whose sum runs over all tokens.
constexpr int64_t kBlockExperts = 16;

int64_t num_blocks(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

/// logits [T, E] = x [T, H] weight [E, H]^T + bias
template <typename T>
void router_logits_kernel_impl(const Matrix<const T>& x,
                               const Matrix<const T>& weight,
                               const T* bias,
                               const Matrix<T>& logits) {
  cpu::parallel_tasks(num_blocks(x.rows, kBlockTokens), [&](int64_t i) {
    const int64_t begin = i * kBlockTokens;
    const int64_t end = std::min(begin + kBlockTokens, x.rows);
    cpu::product(x.row_range(begin, end), weight.transposed(), logits.row_range(begin, end));
    if (bias != nullptr) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t e = 0; e < logits.cols; ++e) {
          logits.data[t * logits.cols + e] += bias[e];
        }
      }
    }
  });
}

/// grad_x [T, H] = grad [T, E] weight [E, H]
template <typename T>
void grad_x_kernel_impl(const Matrix<const T>& grad,
                        const Matrix<const T>& weight,
                        const Matrix<T>& grad_x) {
  cpu::parallel_tasks(num_blocks(grad.rows, kBlockTokens), [&](int64_t i) {
    const int64_t begin = i * kBlockTokens;
    const int64_t end = std::min(begin + kBlockTokens, grad.rows);
    cpu::product(grad.row_range(begin, end), weight, grad_x.row_range(begin, end));
  });
}

/// grad_weight [E, H] = grad [T, E]^T x [T, H]
template <typename T>
void grad_weight_kernel_impl(const Matrix<const T>& grad,
                             const Matrix<const T>& x,
                             const Matrix<T>& grad_weight) {
  const auto grad_t = grad.transposed();
  cpu::parallel_tasks(num_blocks(grad_t.rows, kBlockExperts), [&](int64_t i) {
    const int64_t begin = i * kBlockExperts;
    const int64_t end = std::min(begin + kBlockExperts, grad_t.rows);
    cpu::product(grad_t.row_range(begin, end), x, grad_weight.row_range(begin, end));
  });
}

/// grad_bias [E] = sum of grad [T, E] in token order
template <typename T>
void grad_bias_kernel_impl(const Matrix<const T>& grad, T* grad_bias) {
  std::fill(grad_bias, grad_bias + grad.cols, T(0));
  for (int64_t t = 0; t < grad.rows; ++t) {
    for (int64_t e = 0; e < grad.cols; ++e) {
      grad_bias[e] += grad.data[t * grad.cols + e];
    }
  }
}

template <typename T>
Matrix<const T> const_matrix(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.size(0), tensor.size(1), tensor.size(1)};
}

template <typename T>
Matrix<T> mutable_matrix(at::Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), tensor.size(0), tensor.size(1), tensor.size(1)};
}

at::Tensor router_logits_kernel(const at::Tensor& x,
                                const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  check_router_logits(x, weight, bias);
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto x_acc = contiguous_as(x, acc);
  const auto weight_acc = contiguous_as(weight, acc);
  const auto bias_acc = contiguous_as(bias, acc);
  auto logits = at::empty({x.size(0), weight.size(0)}, x.options().dtype(acc));
  AT_DISPATCH_FLOATING_TYPES(acc, "router_logits", [&] {
    router_logits_kernel_impl<scalar_t>(const_matrix<scalar_t>(x_acc),
                                        const_matrix<scalar_t>(weight_acc),
                                        data_or_null<scalar_t>(bias_acc),
                                        mutable_matrix<scalar_t>(logits));
  });
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward_kernel(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad, x, weight);
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto grad_acc = contiguous_as(grad, acc);
  const auto x_acc = contiguous_as(x, acc);
  const auto weight_acc = contiguous_as(weight, acc);
  const auto options = x.options().dtype(acc);
  auto grad_x = empty_if(output_mask[0], x.sym_sizes(), options);
  auto grad_weight = empty_if(output_mask[1], weight.sym_sizes(), options);
  auto grad_bias = empty_if(output_mask[2], {weight.sym_size(0)}, options);
  AT_DISPATCH_FLOATING_TYPES(acc, "router_logits_backward", [&] {
    const auto g = const_matrix<scalar_t>(grad_acc);
    if (output_mask[0]) {
      grad_x_kernel_impl(g, const_matrix<scalar_t>(weight_acc), mutable_matrix<scalar_t>(grad_x));
    }
    if (output_mask[1]) {
      grad_weight_kernel_impl(
          g, const_matrix<scalar_t>(x_acc), mutable_matrix<scalar_t>(grad_weight));
    }
    if (output_mask[2]) {
      grad_bias_kernel_impl(g, grad_bias.mutable_data_ptr<scalar_t>());
    }
  });
  return {grad_x.to(x.scalar_type()),
          grad_weight.to(weight.scalar_type()),
          grad_bias.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("router_logits", &router_logits_kernel);
  m.impl("_router_logits_backward", &router_logits_backward_kernel);
}

}  // namespace torchmoe

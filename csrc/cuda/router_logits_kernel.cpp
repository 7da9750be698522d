// The products are torch's. They obey torch.backends.cuda.matmul.allow_tf32, the caller's own
// setting and off by default, as any float32 product does.
//
// 16-bit operands are widened first, which is exact, and so is the product of two of them in
// float32; a 16-bit product with a float32 result needs no copy, but not every device has it.
#include <ATen/Dispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/token_sum_tensors.h"
#include "ops/router_logits.h"

namespace torchmoe {

namespace {

/// A backward called inside an autocast region reaches its kernel with autocast on, which would
/// narrow the product's operands again.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

at::Tensor router_logits_kernel(const at::Tensor& x,
                                const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  check_router_logits(x, weight, bias);
  const cuda::OnDevice device(x);
  const WithoutAutocast without_autocast;
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto x_acc = x.to(acc);
  const auto weight_t = weight.to(acc).t();
  return bias ? at::addmm(bias->to(acc), x_acc, weight_t) : at::mm(x_acc, weight_t);
}

/// The sum of contiguous grad [T, E] over tokens, float64.
at::Tensor sum_of_tokens(cuda::Stream stream, const at::Tensor& grad) {
  const cuda::TokenSizes sizes{1, grad.size(0), grad.size(1)};
  return with_accumulate_type(grad.scalar_type(), [&]<typename scalar_t>() {
    return cuda::sum_over_tokens<scalar_t>(stream, sizes, grad, std::nullopt).squeeze(0);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward_kernel(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad, x, weight);
  const cuda::OnDevice device(x);
  const WithoutAutocast without_autocast;
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto grad_acc = contiguous_as(grad, acc);
  auto grad_x = at::empty({0}, x.options());
  auto grad_weight = at::empty({0}, x.options());
  auto grad_bias = at::empty({0}, x.options());
  if (output_mask[0]) {
    grad_x = at::mm(grad_acc, weight.to(acc)).to(x.scalar_type());
  }
  if (output_mask[1]) {
    grad_weight = at::mm(grad_acc.t(), x.to(acc)).to(x.scalar_type());
  }
  if (output_mask[2]) {
    grad_bias = sum_of_tokens(device.stream(), grad_acc).to(x.scalar_type());
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("router_logits", &router_logits_kernel);
  m.impl("_router_logits_backward", &router_logits_backward_kernel);
}

}  // namespace torchmoe

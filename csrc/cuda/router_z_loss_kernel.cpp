#include "cuda/router_z_loss_kernel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/token_sum_tensors.h"
#include "ops/router_z_loss.h"

namespace torchmoe {

namespace {

at::Tensor router_z_loss_kernel(const at::Tensor& logits,
                                const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(logits, token_mask);
  const cuda::OnDevice device(logits);
  const auto stream = device.stream();
  const auto logits_c = logits.contiguous();
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.numel() / num_experts;
  const cuda::TokenSizes sizes{1, num_tokens, 1};
  const cuda::CountedTokens counted(stream, 1, num_tokens, mask);
  const auto acc = accumulate_dtype(logits.scalar_type());
  auto squares = at::empty({num_tokens}, logits.options().dtype(at::kDouble));
  auto loss = at::empty({}, logits.options().dtype(acc));
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    cuda::squared_logsumexp(stream,
                            num_tokens,
                            num_experts,
                            logits_c.const_data_ptr<scalar_t>(),
                            squares.mutable_data_ptr<double>());
    const auto sum = cuda::sum_over_tokens<double>(stream, sizes, squares, mask);
    cuda::divide_by_counts(stream,
                           sizes,
                           sum.const_data_ptr<double>(),
                           counted.counts(),
                           loss.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return loss;
}

at::Tensor router_z_loss_backward_kernel(const at::Tensor& grad,
                                         const at::Tensor& logits,
                                         const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad, logits, token_mask);
  const cuda::OnDevice device(logits);
  const auto stream = device.stream();
  const auto grad_acc = contiguous_as(grad, accumulate_dtype(logits.scalar_type()));
  const auto logits_c = logits.contiguous();
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.numel() / num_experts;
  const cuda::CountedTokens counted(stream, 1, num_tokens, mask);
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    cuda::squared_logsumexp_backward(stream,
                                     num_tokens,
                                     num_experts,
                                     grad_acc.const_data_ptr<at::opmath_type<scalar_t>>(),
                                     logits_c.const_data_ptr<scalar_t>(),
                                     data_or_null<bool>(mask),
                                     counted.counts(),
                                     grad_logits.mutable_data_ptr<scalar_t>());
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("router_z_loss", &router_z_loss_kernel);
  m.impl("_router_z_loss_backward", &router_z_loss_backward_kernel);
}

}  // namespace torchmoe

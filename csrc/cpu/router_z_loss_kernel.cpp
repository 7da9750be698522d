#include <cmath>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/score.h"
#include "cpu/token_blocks.h"
#include "ops/router_z_loss.h"

namespace torchmoe {

namespace {

template <typename T>
T logsumexp(const T* logits, int64_t num_experts) {
  const T top = cpu::largest(num_experts, logits);
  if (std::isinf(top)) {
    return top;
  }
  T sum = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    sum += std::exp(logits[e] - top);
  }
  return top + std::log(sum);
}

at::Tensor router_z_loss_kernel(const at::Tensor& logits,
                                const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(logits, token_mask);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto logits_acc = contiguous_as(logits, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.numel() / num_experts;
  auto loss = at::empty({}, logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* data = logits_acc.const_data_ptr<scalar_t>();
    const auto squares = cpu::sum_over_tokens<scalar_t>(
        num_tokens,
        data_or_null<bool>(mask),
        1,
        [&](int64_t t, double* sum, scalar_t* /*scratch*/) {
          const double z = logsumexp(data + t * num_experts, num_experts);
          *sum += z * z;
        });
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(
        squares.count == 0 ? 0.0 : squares.sums[0] / static_cast<double>(squares.count));
  });
  return loss;
}

/// d lse^2 / d logits = 2 lse softmax(logits), over the number of counted tokens.
at::Tensor router_z_loss_backward_kernel(const at::Tensor& grad,
                                         const at::Tensor& logits,
                                         const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad, logits, token_mask);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto grad_acc = grad.to(acc);
  const auto logits_acc = contiguous_as(logits, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.numel() / num_experts;
  auto grad_logits = at::empty(logits.sizes(), logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* data = logits_acc.const_data_ptr<scalar_t>();
    const bool* mask_data = data_or_null<bool>(mask);
    auto* grad_data = grad_logits.mutable_data_ptr<scalar_t>();
    const auto scale =
        static_cast<scalar_t>(2.0 * static_cast<double>(*grad_acc.const_data_ptr<scalar_t>()) /
                              static_cast<double>(cpu::count_tokens(num_tokens, mask_data)));
    cpu::parallel_items(num_tokens, num_experts, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto* row = data + t * num_experts;
        auto* out = grad_data + t * num_experts;
        if (mask_data != nullptr && !mask_data[t]) {
          std::fill(out, out + num_experts, scalar_t(0));
          continue;
        }
        const scalar_t lse = logsumexp(row, num_experts);
        cpu::softmax(num_experts, row, out);
        // Logits that are all -inf have softmax 0 and cannot be moved: no gradient, instead of inf * 0.
        const scalar_t factor = std::isinf(lse) && lse < 0 ? scalar_t(0) : scale * lse;
        std::transform(out, out + num_experts, out, [factor](scalar_t p) { return factor * p; });
      }
    });
  });
  return grad_logits.to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("router_z_loss", &router_z_loss_kernel);
  m.impl("_router_z_loss_backward", &router_z_loss_backward_kernel);
}

}  // namespace torchmoe

#include "cuda/load_balancing_loss_kernel.h"

#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cuda/device.h"
#include "cuda/token_sum_tensors.h"
#include "ops/load_balancing_loss.h"

namespace torchmoe {

namespace {

constexpr auto kLossOp = "load_balancing_loss";

cuda::TokenSizes sizes_of(const at::Tensor& logits) {
  return {c10::multiply_integers(logits.sizes().slice(0, logits.dim() - 2)),
          logits.size(-2),
          logits.size(-1)};
}

at::Tensor load_balancing_loss_kernel(const at::Tensor& logits,
                                      const at::Tensor& fraction,
                                      std::string_view score_function,
                                      const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss(logits, fraction, score_function, token_mask);
  const cuda::OnDevice device(logits);
  const auto stream = device.stream();
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto logits_c = logits.contiguous();
  const auto fraction_acc = contiguous_as(fraction, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const auto sizes = sizes_of(logits);
  const cuda::CountedTokens counted(stream, sizes.num_sequences, sizes.num_tokens, mask);
  auto shares = at::empty(logits.sizes(), logits.options().dtype(acc));
  auto loss = at::empty({}, shares.options());
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    cuda::score_shares(stream,
                       sizes,
                       choose<ScoreFunction>(kLossOp, score_function),
                       logits_c.const_data_ptr<scalar_t>(),
                       shares.mutable_data_ptr<Acc>());
    const at::Tensor sums = cuda::sum_over_tokens<Acc>(stream, sizes, shares, mask);
    cuda::balance_of_sums(stream,
                          sizes,
                          sums.const_data_ptr<double>(),
                          fraction_acc.const_data_ptr<Acc>(),
                          counted.counts(),
                          loss.mutable_data_ptr<Acc>());
  });
  return loss;
}

at::Tensor load_balancing_loss_backward_kernel(const at::Tensor& grad,
                                               const at::Tensor& logits,
                                               const at::Tensor& fraction,
                                               std::string_view score_function,
                                               const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad, logits, fraction, score_function, token_mask);
  const cuda::OnDevice device(logits);
  const auto stream = device.stream();
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto grad_acc = contiguous_as(grad, acc);
  const auto logits_c = logits.contiguous();
  const auto fraction_acc = contiguous_as(fraction, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const auto sizes = sizes_of(logits);
  const cuda::CountedTokens counted(stream, sizes.num_sequences, sizes.num_tokens, mask);
  auto scales = at::empty({sizes.num_sequences}, logits.options().dtype(acc));
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    cuda::balance_scales(stream,
                         sizes,
                         grad_acc.const_data_ptr<Acc>(),
                         counted.counts(),
                         scales.mutable_data_ptr<Acc>());
    cuda::score_shares_backward(stream,
                                sizes,
                                choose<ScoreFunction>(kLossOp, score_function),
                                scales.const_data_ptr<Acc>(),
                                logits_c.const_data_ptr<scalar_t>(),
                                fraction_acc.const_data_ptr<Acc>(),
                                data_or_null<bool>(mask),
                                grad_logits.mutable_data_ptr<scalar_t>());
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("load_balancing_loss", &load_balancing_loss_kernel);
  m.impl("_load_balancing_loss_backward", &load_balancing_loss_backward_kernel);
}

}  // namespace torchmoe

#include "cuda/select_experts_kernel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "ops/select_experts.h"

namespace torchmoe {

namespace {

at::Tensor select_experts_kernel(const at::Tensor& scores,
                                 int64_t top_k,
                                 const std::optional<at::Tensor>& selection_bias,
                                 const std::optional<at::Tensor>& token_mask,
                                 const std::optional<at::Tensor>& tie_break) {
  check_select_experts(scores, top_k, selection_bias, token_mask, tie_break);
  const cuda::OnDevice device(scores);
  const auto scores_c = scores.contiguous();
  const auto acc = accumulate_dtype(scores.scalar_type());
  const auto bias_acc = contiguous_as(selection_bias, acc);
  const auto tie_break_acc = contiguous_as(tie_break, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  auto indices = at::empty({scores.size(0), top_k}, scores.options().dtype(at::kLong));
  with_float_type(scores.scalar_type(), [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    cuda::select_experts<scalar_t>(device.stream(),
                                   {scores.size(0), scores.size(1), top_k},
                                   {scores_c.const_data_ptr<scalar_t>(),
                                    data_or_null<Acc>(bias_acc),
                                    data_or_null<Acc>(tie_break_acc)},
                                   data_or_null<bool>(mask),
                                   indices.mutable_data_ptr<int64_t>());
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("select_experts", &select_experts_kernel);
}

}  // namespace torchmoe

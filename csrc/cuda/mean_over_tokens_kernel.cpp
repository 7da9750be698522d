#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/token_sum_tensors.h"
#include "ops/mean_over_tokens.h"

namespace torchmoe {

namespace {

at::Tensor mean_over_tokens_kernel(const at::Tensor& values,
                                   const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens(values, token_mask);
  const cuda::OnDevice device(values);
  const auto stream = device.stream();
  const auto values_c = values.contiguous();
  const auto mask = contiguous_as(token_mask, at::kBool);
  auto shape = values.sizes().vec();
  shape.erase(shape.end() - 2);
  const cuda::TokenSizes sizes{c10::multiply_integers(values.sizes().slice(0, values.dim() - 2)),
                               values.size(-2),
                               values.size(-1)};
  const cuda::CountedTokens counted(stream, sizes.num_sequences, sizes.num_tokens, mask);
  const auto acc = accumulate_dtype(values.scalar_type());
  auto means = at::empty(shape, values.options().dtype(acc));
  with_float_type(values.scalar_type(), [&]<typename scalar_t>() {
    const at::Tensor sums = cuda::sum_over_tokens<scalar_t>(stream, sizes, values_c, mask);
    cuda::divide_by_counts(stream,
                           sizes,
                           sums.const_data_ptr<double>(),
                           counted.counts(),
                           means.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return means;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("mean_over_tokens", &mean_over_tokens_kernel);
}

}  // namespace torchmoe

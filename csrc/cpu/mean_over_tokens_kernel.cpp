#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/token_blocks.h"
#include "ops/mean_over_tokens.h"

namespace torchmoe {

namespace {

template <typename T>
void mean_over_tokens_kernel_impl(const T* values,
                                  const bool* token_mask,
                                  int64_t num_sequences,
                                  int64_t num_tokens,
                                  int64_t num_columns,
                                  T* means) {
  for (int64_t s = 0; s < num_sequences; ++s) {
    const T* sequence = values + s * num_tokens * num_columns;
    const auto total =
        cpu::sum_over_tokens<T>(num_tokens,
                                token_mask == nullptr ? nullptr : token_mask + s * num_tokens,
                                num_columns,
                                [&](int64_t t, double* sums, T* /*scratch*/) {
                                  for (int64_t c = 0; c < num_columns; ++c) {
                                    sums[c] += sequence[t * num_columns + c];
                                  }
                                });
    for (int64_t c = 0; c < num_columns; ++c) {
      means[s * num_columns + c] =
          total.count == 0 ? T(0)
                           : static_cast<T>(total.sums[c] / static_cast<double>(total.count));
    }
  }
}

at::Tensor mean_over_tokens_kernel(const at::Tensor& values,
                                   const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens(values, token_mask);
  const auto acc = accumulate_dtype(values.scalar_type());
  const auto values_acc = contiguous_as(values, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  auto sizes = values.sizes().vec();
  sizes.erase(sizes.end() - 2);
  auto means = at::empty(sizes, values.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    mean_over_tokens_kernel_impl(values_acc.const_data_ptr<scalar_t>(),
                                 data_or_null<bool>(mask),
                                 c10::multiply_integers(values.sizes().slice(0, values.dim() - 2)),
                                 values.size(-2),
                                 values.size(-1),
                                 means.mutable_data_ptr<scalar_t>());
  });
  return means;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("mean_over_tokens", &mean_over_tokens_kernel);
}

}  // namespace torchmoe

// From contiguous tensors to the sums of token_sums.h.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/tensors.h"
#include "cuda/token_sums.h"

namespace torchmoe::cuda {

/// The sums [S, C], float64, of values [S, T, C] of type T over the tokens with token_mask [S, T].
template <typename T>
at::Tensor sum_over_tokens(Stream stream,
                           const TokenSizes& sizes,
                           const at::Tensor& values,
                           const std::optional<at::Tensor>& token_mask) {
  const auto options = values.options().dtype(at::kDouble);
  auto block_sums = at::empty(
      {sizes.num_sequences, num_token_blocks(sizes.num_tokens), sizes.num_columns}, options);
  auto sums = at::empty({sizes.num_sequences, sizes.num_columns}, options);
  sum_over_tokens(stream,
                  sizes,
                  values.const_data_ptr<T>(),
                  data_or_null<bool>(token_mask),
                  block_sums.mutable_data_ptr<double>(),
                  sums.mutable_data_ptr<double>());
  return sums;
}

/// How many tokens of each sequence count, on the device only.
class CountedTokens {
 public:
  CountedTokens(Stream stream,
                int64_t num_sequences,
                int64_t num_tokens,
                const std::optional<at::Tensor>& token_mask)
      : num_tokens_(num_tokens) {
    if (token_mask) {
      counted_ =
          sum_over_tokens<bool>(stream, {num_sequences, num_tokens, 1}, *token_mask, std::nullopt);
    }
  }

  TokenCounts counts() const { return {data_or_null<double>(counted_), num_tokens_}; }

 private:
  std::optional<at::Tensor> counted_;
  int64_t num_tokens_;
};

}  // namespace torchmoe::cuda

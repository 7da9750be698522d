// Sums over tokens in a fixed order, in float64: within blocks of tokens first, then over the
// blocks. The order depends on sizes alone.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

struct TokenSizes {
  int64_t num_sequences;
  int64_t num_tokens;
  int64_t num_columns;
};

/// How many tokens of each sequence count: sums of a mask, null where there is none and all count.
struct TokenCounts {
  const double* counted;
  int64_t num_tokens;

  TORCHMOE_HOST_DEVICE double of(int64_t sequence) const {
    return counted == nullptr ? static_cast<double>(num_tokens) : counted[sequence];
  }
};

/// The blocks of tokens that a sequence is cut into.
int64_t num_token_blocks(int64_t num_tokens);

/// sums[s, c] = sum over t with token_mask[s, t] (null: all) of values[s, t, c], a bool as 0 or 1.
/// block_sums is room for [num_sequences, num_token_blocks, num_columns].
template <typename T>
void sum_over_tokens(Stream stream,
                     const TokenSizes& sizes,
                     const T* values,
                     const bool* token_mask,
                     double* block_sums,
                     double* sums);

/// means[s, c] = sums[s, c] / number of counted tokens, 0 where none counts.
template <typename T>
void divide_by_counts(Stream stream,
                      const TokenSizes& sizes,
                      const double* sums,
                      const TokenCounts& counts,
                      T* means);

}  // namespace torchmoe::cuda

// Sums over tokens in a fixed order: every block of tokens is one task, and the blocks' sums are
// added one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace torchmoe::cpu {

/// The sums over the counted tokens of one sequence, and how many there are.
struct TokenSums {
  std::vector<double> sums;
  int64_t count = 0;
};

/// The sums over the tokens with token_mask (null: all) of `width` terms each. add_terms(token,
/// sums, scratch) adds a token's terms to its block's sums, in float64 whatever T is; scratch has
/// room for `width` elements.
template <typename T, typename AddTerms>
TokenSums sum_over_tokens(int64_t num_tokens,
                          const bool* token_mask,
                          int64_t width,
                          const AddTerms& add_terms) {
  constexpr int64_t kBlockTokens = 256;  // some microseconds of work for a toy layer's experts
  const int64_t num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  std::vector<TokenSums> blocks(num_blocks);
  parallel_tasks(num_blocks, kBlockTokens * width, [&](int64_t i) {
    auto& block = blocks[i];
    block.sums.assign(width, 0.0);
    std::vector<T> scratch(width);
    const int64_t end = std::min((i + 1) * kBlockTokens, num_tokens);
    for (int64_t t = i * kBlockTokens; t < end; ++t) {
      if (token_mask == nullptr || token_mask[t]) {
        ++block.count;
        add_terms(t, block.sums.data(), scratch.data());
      }
    }
  });
  TokenSums total{std::vector<double>(width, 0.0)};
  for (const auto& block : blocks) {
    total.count += block.count;
    for (int64_t i = 0; i < width; ++i) {
      total.sums[i] += block.sums[i];
    }
  }
  return total;
}

/// How many of the tokens count.
inline int64_t count_tokens(int64_t num_tokens, const bool* token_mask) {
  return token_mask == nullptr ? num_tokens : std::count(token_mask, token_mask + num_tokens, true);
}

}  // namespace torchmoe::cpu

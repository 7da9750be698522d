// The launcher of select_experts. T is the stored type of the scores, its opmath type the one that
// they rank in.
#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>

#include "cuda/stream.h"

namespace torchmoe::cuda {

struct SelectSizes {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
};

/// What ranks the experts, with what decides between equal scores.
template <typename T>
struct SelectScores {
  const T* scores;                      // [T, E]
  const at::opmath_type<T>* bias;       // [E] or null
  const at::opmath_type<T>* tie_break;  // [T, E] or null
};

/// token_mask [T] or null -> indices [T, K]
template <typename T>
void select_experts(Stream stream,
                    const SelectSizes& sizes,
                    const SelectScores<T>& scores,
                    const bool* token_mask,
                    int64_t* indices);

}  // namespace torchmoe::cuda

// The launchers of gate_weights. T is the stored type of the logits, its opmath type the one that
// weights and their gradients have.
#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>

#include "common/vocabulary.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

struct GateSizes {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
};

/// logits [T, E], indices [T, K] -> weights [T, K]
template <typename T>
void gate_weights(Stream stream,
                  const GateSizes& sizes,
                  ScoreFunction score_function,
                  Normalize normalize,
                  const T* logits,
                  const int64_t* indices,
                  at::opmath_type<T>* weights);

/// The exact derivative: grad [T, K] -> grad_logits [T, E]
template <typename T>
void gate_weights_backward(Stream stream,
                           const GateSizes& sizes,
                           ScoreFunction score_function,
                           Normalize normalize,
                           const at::opmath_type<T>* grad,
                           const T* logits,
                           const int64_t* indices,
                           T* grad_logits);

}  // namespace torchmoe::cuda

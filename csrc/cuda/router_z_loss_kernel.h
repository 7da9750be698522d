// The launchers of router_z_loss. T is the stored type of the logits [T, E].
#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>

#include "cuda/stream.h"
#include "cuda/token_sums.h"

namespace torchmoe::cuda {

/// squares[t] = logsumexp(logits_t)^2
template <typename T>
void squared_logsumexp(
    Stream stream, int64_t num_tokens, int64_t num_experts, const T* logits, double* squares);

/// The derivative of the mean of squares over the tokens with token_mask (null: all), whose number
/// is counts.of(0), for the scalar at `grad`.
template <typename T>
void squared_logsumexp_backward(Stream stream,
                                int64_t num_tokens,
                                int64_t num_experts,
                                const at::opmath_type<T>* grad,
                                const T* logits,
                                const bool* token_mask,
                                const TokenCounts& counts,
                                T* grad_logits);

}  // namespace torchmoe::cuda

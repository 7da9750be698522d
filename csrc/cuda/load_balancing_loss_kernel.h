// The launchers of load_balancing_loss. T is the stored type of the logits [S, T, E], its opmath
// type the one of fraction [S, E] and of the loss.
#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>

#include "common/vocabulary.h"
#include "cuda/stream.h"
#include "cuda/token_sums.h"

namespace torchmoe::cuda {

/// shares[t, e] = p[t, e] / sum_e p[t, e], p being score_function(logits), 0 where the sum is 0.
template <typename T>
void score_shares(Stream stream,
                  const TokenSizes& sizes,
                  ScoreFunction score_function,
                  const T* logits,
                  at::opmath_type<T>* shares);

/// The loss from the sums [S, E] of the shares over the counted tokens.
template <typename Acc>
void balance_of_sums(Stream stream,
                     const TokenSizes& sizes,
                     const double* share_sums,
                     const Acc* fraction,
                     const TokenCounts& counts,
                     Acc* loss);

/// What every <fraction, share of a token> of sequence s is multiplied by in the loss, times the
/// scalar at `grad`: scales [S].
template <typename Acc>
void balance_scales(Stream stream,
                    const TokenSizes& sizes,
                    const Acc* grad,
                    const TokenCounts& counts,
                    Acc* scales);

/// The derivative of scales[s] * <fraction[s], shares[t]> for the tokens with token_mask (null:
/// all), 0 for the others.
template <typename T>
void score_shares_backward(Stream stream,
                           const TokenSizes& sizes,
                           ScoreFunction score_function,
                           const at::opmath_type<T>* scales,
                           const T* logits,
                           const at::opmath_type<T>* fraction,
                           const bool* token_mask,
                           T* grad_logits);

}  // namespace torchmoe::cuda

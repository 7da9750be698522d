// Balance without a loss: a bias that affects the ranking only and is moved against the load.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The selection bias after one step: up by `rate` below the mean load, down by it above.
///
///     bias_i + rate * sign(mean(tokens_per_expert) - tokens_per_expert_i)
///
/// Auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664), as in DeepSeek-V3 (arXiv
/// 2412.19437). The bias is added to the scores for ranking only: weights and their gradients never
/// see it. `centred` subtracts the mean of the step's moves, so that the mean of the bias does not
/// change.
///
/// bias [E] floating; tokens_per_expert [E], slots per expert of one step, over all micro-batches
/// and processes; rate a finite number >= 0 -> the new bias [E] in the dtype of bias; without a
/// counted token a copy of it.
at::Tensor update_selection_bias(const at::Tensor& bias,
                                 const at::Tensor& tokens_per_expert,
                                 double rate,
                                 bool centred = false);

}  // namespace torchmoe

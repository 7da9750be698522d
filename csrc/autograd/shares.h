// Scores and their shares as compositions of torch's ops, for the derivatives that no kernel forms.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "common/vocabulary.h"

namespace torchmoe {

/// score_function(logits), a softmax over the last dimension or a sigmoid; a row of -inf has
/// softmax 0.
at::Tensor scores_of(const at::Tensor& logits, ScoreFunction score_function);

/// Scores over their sum, along the last dimension, formed from their logarithms so that scores
/// which underflow have a share; where `counts`, if given, is false a score counts as 0. Shares of
/// nothing are 0.
at::Tensor shares_of(const at::Tensor& logits,
                     ScoreFunction score_function,
                     const std::optional<at::Tensor>& counts = std::nullopt);

}  // namespace torchmoe

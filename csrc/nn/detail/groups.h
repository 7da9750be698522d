// Group-limited selection: a token's experts come from its best groups.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe::nn {

/// The scores [T, E] with -inf for experts outside a token's best groups (DeepSeek-V3, arXiv
/// 2412.19437). A group's score is the sum of its two best experts' (of one where it has no more);
/// ties go to the group whose two have the larger sum of exp(logit), what scores that have
/// underflowed are proportional to, then to the lower group. A mask of 0 instead of -inf would let
/// an expert outside the groups win over negative scores. The groups are num_groups of neighbours.
at::Tensor limit_to_groups(const at::Tensor& scores,
                           const at::Tensor& logits,
                           int64_t num_groups,
                           int64_t top_groups);

}  // namespace torchmoe::nn

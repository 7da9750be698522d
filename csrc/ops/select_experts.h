#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The top_k experts of each token, best first: by score descending, ties to the lower expert id.
/// NaN ranks last, after -inf; every expert may be chosen, also at -inf, so that top_k ids always
/// come out.
///
/// scores [T, E] floating; selection_bias [E] floating is added to the scores for ranking only;
/// token_mask [T] bool, a token where it is false gets -1 in every slot -> indices [T, top_k]
/// int64. Not differentiable.
at::Tensor select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias = std::nullopt,
                          const std::optional<at::Tensor>& token_mask = std::nullopt);

void check_select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias,
                          const std::optional<at::Tensor>& token_mask);

}  // namespace torchmoe

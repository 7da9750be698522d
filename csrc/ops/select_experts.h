#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The top_k experts of each token, best first: by score descending, then by tie_break descending,
/// then to the lower expert id. NaN ranks last, after -inf. An expert may be chosen even at -inf,
/// so every token gets top_k ids.
///
/// scores [T, E] floating; selection_bias [E] floating is added to the scores for ranking only;
/// token_mask [T] bool, a token where it is false gets -1 in every slot; tie_break [T, E] floating
/// decides between experts whose scores, with the bias, are equal -> indices [T, top_k] int64. Not
/// differentiable.
at::Tensor select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias = std::nullopt,
                          const std::optional<at::Tensor>& token_mask = std::nullopt,
                          const std::optional<at::Tensor>& tie_break = std::nullopt);

/// Checks that tie_break has the shape and device of the scores, the argument `like_name`.
void check_tie_break(std::string_view op,
                     const std::optional<at::Tensor>& tie_break,
                     const at::Tensor& scores,
                     std::string_view like_name);

void check_select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias,
                          const std::optional<at::Tensor>& token_mask,
                          const std::optional<at::Tensor>& tie_break);

}  // namespace torchmoe

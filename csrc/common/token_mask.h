// token_mask means the same in every op that takes one: true = the token counts.
#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace torchmoe {

/// bool, with the leading dimensions of `scores` (all but the experts), on its device.
inline void check_token_mask(std::string_view op,
                             const std::optional<at::Tensor>& token_mask,
                             std::string_view scores_name,
                             const at::Tensor& scores) {
  if (!token_mask) {
    return;
  }
  check_dtype(op, "token_mask", *token_mask, at::kBool);
  const auto leading = scores.sym_sizes().slice(0, scores.dim() - 1);
  TORCH_CHECK(token_mask->sym_sizes() == leading,
              op,
              ": token_mask must have the leading dimensions of ",
              scores_name,
              " ",
              leading,
              ", got shape ",
              token_mask->sym_sizes());
  check_same_device(op, "token_mask", *token_mask, scores_name, scores);
}

}  // namespace torchmoe

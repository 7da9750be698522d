#include "ops/select_experts.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"
#include "common/token_mask.h"

namespace torchmoe {

at::Tensor select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias,
                          const std::optional<at::Tensor>& token_mask,
                          const std::optional<at::Tensor>& tie_break) {
  static const auto op = find_op<decltype(select_experts)>("torchmoe::select_experts");
  return op.call(scores, top_k, selection_bias, token_mask, tie_break);
}

void check_tie_break(std::string_view op,
                     const std::optional<at::Tensor>& tie_break,
                     const at::Tensor& scores,
                     std::string_view like_name) {
  if (tie_break) {
    check_floating(op, "tie_break", *tie_break);
    check_shape(op,
                "tie_break",
                *tie_break,
                {scores.sym_size(0), scores.sym_size(1)},
                "[num_tokens, num_experts]");
    check_same_device(op, "tie_break", *tie_break, like_name, scores);
  }
}

void check_select_experts(const at::Tensor& scores,
                          int64_t top_k,
                          const std::optional<at::Tensor>& selection_bias,
                          const std::optional<at::Tensor>& token_mask,
                          const std::optional<at::Tensor>& tie_break) {
  constexpr auto op = "select_experts";
  check_dim(op, "scores", scores, 2, "[num_tokens, num_experts]");
  check_floating(op, "scores", scores);
  check_top_k(op, top_k, scores.sym_size(1));
  if (selection_bias) {
    check_shape(op, "selection_bias", *selection_bias, {scores.sym_size(1)}, "[num_experts]");
    check_floating(op, "selection_bias", *selection_bias);
    check_same_device(op, "selection_bias", *selection_bias, "scores", scores);
  }
  check_token_mask(op, token_mask, "scores", scores);
  check_tie_break(op, tie_break, scores, "scores");
}

namespace {

at::Tensor select_experts_meta(const at::Tensor& scores,
                               int64_t top_k,
                               const std::optional<at::Tensor>& selection_bias,
                               const std::optional<at::Tensor>& token_mask,
                               const std::optional<at::Tensor>& tie_break) {
  check_select_experts(scores, top_k, selection_bias, token_mask, tie_break);
  return at::empty_symint({scores.sym_size(0), top_k}, scores.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("select_experts", &select_experts_meta);
}

}  // namespace torchmoe

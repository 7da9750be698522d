#include "ops/mean_over_tokens.h"

#include <algorithm>
#include <utility>

#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/token_mask.h"

namespace torchmoe {

at::Tensor mean_over_tokens(const at::Tensor& values, const std::optional<at::Tensor>& token_mask) {
  static const auto op = find_op<decltype(mean_over_tokens)>("torchmoe::mean_over_tokens");
  return op.call(values, token_mask);
}

at::Tensor mean_over_tokens_backward(const at::Tensor& grad,
                                     c10::SymInt num_tokens,
                                     const std::optional<at::Tensor>& token_mask) {
  static const auto op =
      find_op<decltype(mean_over_tokens_backward)>("torchmoe::_mean_over_tokens_backward");
  return op.call(grad, std::move(num_tokens), token_mask);
}

void check_mean_over_tokens(const at::Tensor& values, const std::optional<at::Tensor>& token_mask) {
  constexpr auto op = "mean_over_tokens";
  check_floating(op, "values", values);
  TORCH_CHECK(values.dim() >= 2,
              op,
              ": values must be [..., num_tokens, num_columns], got shape ",
              values.sym_sizes());
  check_token_mask(op, token_mask, "values", values);
}

void check_mean_over_tokens_backward(const at::Tensor& grad,
                                     const c10::SymInt& num_tokens,
                                     const std::optional<at::Tensor>& token_mask) {
  constexpr auto op = "_mean_over_tokens_backward";
  check_floating(op, "grad", grad);
  TORCH_CHECK(
      grad.dim() >= 1, op, ": grad must be [..., num_columns], got shape ", grad.sym_sizes());
  if (token_mask) {
    check_dtype(op, "token_mask", *token_mask, at::kBool);
    auto expected = grad.sym_sizes().vec();
    expected.back() = num_tokens;
    TORCH_CHECK(token_mask->sym_sizes() == c10::SymIntArrayRef(expected),
                op,
                ": token_mask must be [..., num_tokens] = ",
                c10::SymIntArrayRef(expected),
                ", got shape ",
                token_mask->sym_sizes());
    check_same_device(op, "token_mask", *token_mask, "grad", grad);
  }
}

namespace {

at::Tensor mean_over_tokens_meta(const at::Tensor& values,
                                 const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens(values, token_mask);
  auto sizes = values.sym_sizes().vec();
  sizes.erase(sizes.end() - 2);
  return at::empty_symint(sizes, values.options().dtype(accumulate_dtype(values.scalar_type())));
}

at::Tensor mean_over_tokens_backward_meta(const at::Tensor& grad,
                                          c10::SymInt num_tokens,
                                          const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens_backward(grad, num_tokens, token_mask);
  auto sizes = grad.sym_sizes().vec();
  sizes.insert(sizes.end() - 1, std::move(num_tokens));
  return at::empty_symint(sizes, grad.options());
}

at::Tensor mean_over_tokens_backward_composite(const at::Tensor& grad,
                                               int64_t num_tokens,
                                               const std::optional<at::Tensor>& token_mask) {
  check_mean_over_tokens_backward(grad, num_tokens, token_mask);
  auto sizes = grad.sizes().vec();
  sizes.insert(sizes.end() - 1, num_tokens);
  if (!token_mask) {
    const auto each = at::div(grad, std::max<int64_t>(num_tokens, 1));
    return each.unsqueeze(-2).expand(sizes).contiguous();
  }
  const auto count = token_mask->sum(-1, /*keepdim=*/true).clamp_min(1).to(grad.scalar_type());
  const auto each = at::div(grad, count).unsqueeze(-2);
  return at::where(token_mask->unsqueeze(-1), each, at::zeros({}, grad.options())).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("mean_over_tokens", &mean_over_tokens_meta);
  m.impl("_mean_over_tokens_backward", &mean_over_tokens_backward_meta);
}

// One value per sequence and column, copied to its tokens: the same on every backend.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("_mean_over_tokens_backward", &mean_over_tokens_backward_composite);
}

}  // namespace torchmoe

#include "ops/load_balancing_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/token_mask.h"
#include "common/vocabulary.h"

namespace torchmoe {

at::Tensor load_balancing_loss(const at::Tensor& logits,
                               const at::Tensor& fraction,
                               std::string_view score_function,
                               const std::optional<at::Tensor>& token_mask) {
  static const auto op = find_op<decltype(load_balancing_loss)>("torchmoe::load_balancing_loss");
  return op.call(logits, fraction, score_function, token_mask);
}

at::Tensor load_balancing_loss_backward(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const std::optional<at::Tensor>& token_mask) {
  static const auto op =
      find_op<decltype(load_balancing_loss_backward)>("torchmoe::_load_balancing_loss_backward");
  return op.call(grad, logits, fraction, score_function, token_mask);
}

void check_load_balancing_loss(const at::Tensor& logits,
                               const at::Tensor& fraction,
                               std::string_view score_function,
                               const std::optional<at::Tensor>& token_mask) {
  constexpr auto op = "load_balancing_loss";
  choose<ScoreFunction>(op, score_function);
  check_floating(op, "logits", logits);
  TORCH_CHECK(logits.dim() >= 2,
              op,
              ": logits must be [..., num_tokens, num_experts], got shape ",
              logits.sym_sizes());
  check_floating(op, "fraction", fraction);
  auto expected = logits.sym_sizes().vec();
  expected.erase(expected.end() - 2);
  TORCH_CHECK(fraction.sym_sizes() == c10::SymIntArrayRef(expected),
              op,
              ": fraction must be [..., num_experts] = ",
              c10::SymIntArrayRef(expected),
              ", got shape ",
              fraction.sym_sizes());
  check_same_device(op, "fraction", fraction, "logits", logits);
  check_token_mask(op, token_mask, "logits", logits);
}

void check_load_balancing_loss_backward(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss(logits, fraction, score_function, token_mask);
  constexpr auto op = "_load_balancing_loss_backward";
  check_dim(op, "grad", grad, 0, "a scalar");
  check_gradient(op, grad, "logits", logits);
}

namespace {

at::Tensor load_balancing_loss_meta(const at::Tensor& logits,
                                    const at::Tensor& fraction,
                                    std::string_view score_function,
                                    const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss(logits, fraction, score_function, token_mask);
  return at::empty({}, logits.options().dtype(accumulate_dtype(logits.scalar_type())));
}

at::Tensor load_balancing_loss_backward_meta(const at::Tensor& grad,
                                             const at::Tensor& logits,
                                             const at::Tensor& fraction,
                                             std::string_view score_function,
                                             const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad, logits, fraction, score_function, token_mask);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("load_balancing_loss", &load_balancing_loss_meta);
  m.impl("_load_balancing_loss_backward", &load_balancing_loss_backward_meta);
}

}  // namespace torchmoe

#include "ops/expert_parameters.h"

#include "common/activation.h"
#include "common/checks.h"
#include "common/vocabulary.h"

namespace torchmoe {

void check_expert_parameters(std::string_view op,
                             const at::Tensor& x,
                             const ExpertParameters& experts,
                             std::string_view activation) {
  const auto& [w_in, b_in, w_out, b_out] = experts;
  const auto chosen = choose<Activation>(op, activation);
  check_dim(op, "x", x, 2, "[num_tokens, hidden_size]");
  check_floating(op, "x", x);
  check_dim(op, "w_out", w_out, 3, "[num_experts, hidden_size, intermediate_size]");
  const auto num_experts = w_out.sym_size(0);
  const auto intermediate = w_out.sym_size(2);
  const auto pre_width = is_gated(chosen) ? 2 * intermediate : intermediate;
  const auto w_in_layout = is_gated(chosen) ? "[num_experts, 2 * intermediate_size, hidden_size]"
                                            : "[num_experts, intermediate_size, hidden_size]";
  check_shape(op,
              "w_out",
              w_out,
              {num_experts, x.sym_size(1), intermediate},
              "[num_experts, hidden_size, intermediate_size]");
  check_shape(op, "w_in", w_in, {num_experts, pre_width, x.sym_size(1)}, w_in_layout);
  // The matrices are the layer's and x the caller's, so that x is what is of another type.
  check_floating(op, "w_in", w_in);
  check_same_dtype(op, "x", x, "w_in", w_in);
  check_same_dtype(op, "w_out", w_out, "x", x);
  check_same_device(op, "w_in", w_in, "x", x);
  check_same_device(op, "w_out", w_out, "x", x);
  if (b_in) {
    check_shape(op, "b_in", *b_in, {num_experts, pre_width}, "[num_experts, rows of w_in]");
    check_same_dtype(op, "b_in", *b_in, "x", x);
    check_same_device(op, "b_in", *b_in, "x", x);
  }
  if (b_out) {
    check_shape(op, "b_out", *b_out, {num_experts, x.sym_size(1)}, "[num_experts, hidden_size]");
    check_same_dtype(op, "b_out", *b_out, "x", x);
    check_same_device(op, "b_out", *b_out, "x", x);
  }
}

}  // namespace torchmoe

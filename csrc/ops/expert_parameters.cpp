#include "ops/expert_parameters.h"

#include "common/activation.h"
#include "common/checks.h"

namespace torchmoe {

void check_expert_parameters(std::string_view op,
                             std::string_view x_name,
                             const at::Tensor& x,
                             const ExpertParameters& experts,
                             const ExpertActivation& activation) {
  const auto& [w_in, b_in, w_out, b_out] = experts;
  const bool gated = choose_activation(op, activation).is_gated();
  check_dim(op, x_name, x, 2, "[num_tokens, hidden_size]");
  check_floating(op, x_name, x);
  check_dim(op, "w_out", w_out, 3, "[num_experts, hidden_size, intermediate_size]");
  const auto num_experts = w_out.sym_size(0);
  const auto intermediate = w_out.sym_size(2);
  const auto pre_width = gated ? 2 * intermediate : intermediate;
  const auto w_in_layout = gated ? "[num_experts, 2 * intermediate_size, hidden_size]"
                                 : "[num_experts, intermediate_size, hidden_size]";
  check_shape(op,
              "w_out",
              w_out,
              {num_experts, x.sym_size(1), intermediate},
              "[num_experts, hidden_size, intermediate_size]");
  check_shape(op, "w_in", w_in, {num_experts, pre_width, x.sym_size(1)}, w_in_layout);
  check_floating(op, "w_in", w_in);
  check_same_dtype(op, "w_out", w_out, "w_in", w_in);
  check_same_device(op, "w_in", w_in, x_name, x);
  check_same_device(op, "w_out", w_out, x_name, x);
  if (b_in) {
    check_shape(op, "b_in", *b_in, {num_experts, pre_width}, "[num_experts, rows of w_in]");
    check_same_dtype(op, "b_in", *b_in, "w_in", w_in);
    check_same_device(op, "b_in", *b_in, x_name, x);
  }
  if (b_out) {
    check_shape(op, "b_out", *b_out, {num_experts, x.sym_size(1)}, "[num_experts, hidden_size]");
    check_same_dtype(op, "b_out", *b_out, "w_in", w_in);
    check_same_device(op, "b_out", *b_out, x_name, x);
  }
}

}  // namespace torchmoe

#include "ops/grouped_mlp.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "ops/dispatch_plan.h"
#include "ops/expert_mlp.h"

namespace torchmoe {

at::Tensor grouped_mlp(const at::Tensor& rows,
                       const ExpertParameters& experts,
                       const at::Tensor& expert_offsets,
                       const ExpertActivation& activation) {
  static const auto op = find_op<decltype(grouped_mlp)>("torchmoe::grouped_mlp");
  return call(op, rows, experts, expert_offsets, activation);
}

void check_grouped_mlp(const at::Tensor& rows,
                       const ExpertParameters& experts,
                       const at::Tensor& expert_offsets,
                       const ExpertActivation& activation) {
  constexpr auto op = "grouped_mlp";
  check_dim(op, "rows", rows, 2, "[num_rows, hidden_size]");
  check_expert_parameters(op, "rows", rows, experts, activation);
  check_expert_offsets(op, expert_offsets, "rows", rows);
  check_shape(
      op, "expert_offsets", expert_offsets, {experts.w_in.sym_size(0) + 1}, "[num_experts + 1]");
}

at::Tensor compose_grouped_mlp(const at::Tensor& rows,
                               const ExpertParameters& experts,
                               const at::Tensor& expert_offsets,
                               const ExpertActivation& activation) {
  const auto num_rows = rows.sym_size(0);
  const auto places =
      at::arange(num_rows, at::TensorOptions().dtype(at::kLong).device(rows.device()));
  const auto dtype = accumulate_dtype(experts.w_in.scalar_type());
  const auto ones = at::ones_symint({num_rows, 1}, rows.options().dtype(dtype));
  const DispatchPlan plan{expert_offsets, places, places.unsqueeze(1)};
  return std::get<0>(expert_mlp_forward(rows, ones, experts, plan, /*save_pre=*/false, activation));
}

namespace {

at::Tensor grouped_mlp_composite(const at::Tensor& rows,
                                 const ExpertParameters& experts,
                                 const at::Tensor& expert_offsets,
                                 const ExpertActivation& activation) {
  check_grouped_mlp(rows, experts, expert_offsets, activation);
  return compose_grouped_mlp(rows, experts, expert_offsets, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("grouped_mlp", with_records<&grouped_mlp_composite>);
}

}  // namespace torchmoe

#include "ops/dispatch_plan.h"

#include <limits>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

DispatchPlan dispatch_plan(const at::Tensor& indices, c10::SymInt num_experts) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, c10::SymInt);
  static const auto op = find_op<Signature>("torchmoe::dispatch_plan");
  auto [expert_offsets, row_to_slot, slot_to_row] = op.call(indices, std::move(num_experts));
  return {expert_offsets, row_to_slot, slot_to_row};
}

void check_dispatch_plan(const at::Tensor& indices, const c10::SymInt& num_experts) {
  constexpr auto op = "dispatch_plan";
  check_dim(op, "indices", indices, 2, "[num_tokens, top_k]");
  check_dtype(op, "indices", indices, at::kLong);
  // A table has an entry more than there are experts.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(num_experts >= 0 && num_experts <= kMost,
                    op,
                    ": num_experts must be in [0, ",
                    kMost,
                    "], got ",
                    num_experts);
}

void check_expert_offsets(std::string_view op,
                          const at::Tensor& expert_offsets,
                          std::string_view like_name,
                          const at::Tensor& like) {
  check_dim(op, "expert_offsets", expert_offsets, 1, "[num_experts + 1]");
  check_dtype(op, "expert_offsets", expert_offsets, at::kLong);
  TORCH_CHECK(expert_offsets.sym_size(0) >= 1,
              op,
              ": expert_offsets must be [num_experts + 1], got shape ",
              expert_offsets.sym_sizes());
  check_same_device(op, "expert_offsets", expert_offsets, like_name, like);
}

void check_plan(std::string_view op,
                const DispatchPlan& plan,
                std::string_view like_name,
                const at::Tensor& like) {
  const auto& [expert_offsets, row_to_slot, slot_to_row] = plan;
  check_expert_offsets(op, expert_offsets, like_name, like);
  check_dim(op, "slot_to_row", slot_to_row, 2, "[num_tokens, top_k]");
  check_dtype(op, "slot_to_row", slot_to_row, at::kLong);
  check_shape(op,
              "row_to_slot",
              row_to_slot,
              {slot_to_row.sym_size(0) * slot_to_row.sym_size(1)},
              "[num_tokens * top_k]");
  check_dtype(op, "row_to_slot", row_to_slot, at::kLong);
  check_same_device(op, "row_to_slot", row_to_slot, like_name, like);
  check_same_device(op, "slot_to_row", slot_to_row, like_name, like);
}

namespace {

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatch_plan_meta(const at::Tensor& indices,
                                                                  c10::SymInt num_experts) {
  // NOLINTEND(performance-unnecessary-value-param)
  check_dispatch_plan(indices, num_experts);
  return {at::empty_symint({num_experts + 1}, indices.options()),
          at::empty_symint({indices.sym_size(0) * indices.sym_size(1)}, indices.options()),
          at::empty_symint(indices.sym_sizes(), indices.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("dispatch_plan", &dispatch_plan_meta);
}

}  // namespace torchmoe

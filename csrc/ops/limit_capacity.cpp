#include "ops/limit_capacity.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"
#include "common/vocabulary.h"
#include "ops/select_experts.h"

namespace torchmoe {

at::Tensor limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow,
                          const std::optional<at::Tensor>& scores,
                          const std::optional<at::Tensor>& backup,
                          const std::optional<at::Tensor>& tie_break) {
  static const auto op = find_op<decltype(limit_capacity)>("torchmoe::limit_capacity");
  return op.call(indices, capacity, order, priority, overflow, scores, backup, tie_break);
}

namespace {

/// An argument that some overflows read must come with them, and with no other.
void check_presence(std::string_view name,
                    const std::optional<at::Tensor>& tensor,
                    bool is_read,
                    std::string_view overflow) {
  TORCH_CHECK_VALUE(tensor || !is_read,
                    "limit_capacity: ",
                    name,
                    " must be given with overflow \"",
                    overflow,
                    "\", got None");
  TORCH_CHECK_VALUE(!tensor || is_read,
                    "limit_capacity: ",
                    name,
                    " must be None with overflow \"",
                    overflow,
                    "\", got a tensor of shape ",
                    tensor->sym_sizes());
}

}  // namespace

void check_limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow,
                          const std::optional<at::Tensor>& scores,
                          const std::optional<at::Tensor>& backup,
                          const std::optional<at::Tensor>& tie_break) {
  constexpr auto op = "limit_capacity";
  check_dim(op, "indices", indices, 2, "[num_tokens, top_k]");
  check_dtype(op, "indices", indices, at::kLong);
  check_dim(op, "capacity", capacity, 1, "[num_experts]");
  check_dtype(op, "capacity", capacity, at::kLong);
  check_same_device(op, "capacity", capacity, "indices", indices);
  choose<CapacityOrder>(op, order);
  if (priority) {
    check_shape(op,
                "priority",
                *priority,
                {indices.sym_size(0), indices.sym_size(1)},
                "[num_tokens, top_k]");
    check_floating(op, "priority", *priority);
    check_same_device(op, "priority", *priority, "indices", indices);
  }
  const auto chosen = choose<Overflow>(op, overflow);
  check_presence("scores", scores, chosen != Overflow::drop, overflow);
  if (scores) {
    check_shape(op,
                "scores",
                *scores,
                {indices.sym_size(0), capacity.sym_size(0)},
                "[num_tokens, num_experts]");
    check_floating(op, "scores", *scores);
    check_same_device(op, "scores", *scores, "indices", indices);
    check_tie_break(op, tie_break, *scores, "indices");
  }
  TORCH_CHECK_VALUE(!tie_break || scores,
                    op,
                    ": tie_break must be None without scores, got a tensor of shape ",
                    tie_break->sym_sizes());
  check_presence("backup", backup, chosen == Overflow::backup, overflow);
  if (backup) {
    check_shape(op, "backup", *backup, {capacity.sym_size(0)}, "[num_experts]");
    check_dtype(op, "backup", *backup, at::kLong);
    check_same_device(op, "backup", *backup, "indices", indices);
  }
}

void check_limit_capacity_entries(at::IntArrayRef capacity, std::optional<at::IntArrayRef> backup) {
  const auto num_experts = static_cast<int64_t>(capacity.size());
  for (int64_t e = 0; e < num_experts; ++e) {
    TORCH_CHECK_VALUE(capacity[e] >= 0,
                      "limit_capacity: capacity must be >= 0 for every expert, got ",
                      capacity[e],
                      " for expert ",
                      e);
  }
  if (backup) {
    check_backup("limit_capacity", *backup);
  }
}

void check_backup(std::string_view op, at::IntArrayRef backup) {
  const auto num_experts = static_cast<int64_t>(backup.size());
  for (int64_t e = 0; e < num_experts; ++e) {
    TORCH_CHECK_VALUE(backup[e] >= 0 && backup[e] < num_experts && backup[e] != e,
                      op,
                      ": backup must be another expert in [0, ",
                      num_experts,
                      ") for every expert, got ",
                      backup[e],
                      " for expert ",
                      e);
  }
}

namespace {

at::Tensor limit_capacity_meta(const at::Tensor& indices,
                               const at::Tensor& capacity,
                               std::string_view order,
                               const std::optional<at::Tensor>& priority,
                               std::string_view overflow,
                               const std::optional<at::Tensor>& scores,
                               const std::optional<at::Tensor>& backup,
                               const std::optional<at::Tensor>& tie_break) {
  check_limit_capacity(indices, capacity, order, priority, overflow, scores, backup, tie_break);
  return at::empty_symint(indices.sym_sizes(), indices.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("limit_capacity", &limit_capacity_meta);
}

}  // namespace torchmoe

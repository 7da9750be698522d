#include "ops/limit_capacity.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/choices.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow) {
  static const auto op = find_op<decltype(limit_capacity)>("torchmoe::limit_capacity");
  return op.call(indices, capacity, order, priority, overflow);
}

void check_limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow) {
  constexpr auto op = "limit_capacity";
  check_dim(op, "indices", indices, 2, "[num_tokens, top_k]");
  check_dtype(op, "indices", indices, at::kLong);
  check_dim(op, "capacity", capacity, 1, "[num_experts]");
  check_dtype(op, "capacity", capacity, at::kLong);
  check_same_device(op, "capacity", capacity, "indices", indices);
  choose_order(op, order);
  choose_overflow(op, overflow);
  if (priority) {
    check_shape(op,
                "priority",
                *priority,
                {indices.sym_size(0), indices.sym_size(1)},
                "[num_tokens, top_k]");
    check_floating(op, "priority", *priority);
    check_same_device(op, "priority", *priority, "indices", indices);
  }
}

namespace {

at::Tensor limit_capacity_meta(const at::Tensor& indices,
                               const at::Tensor& capacity,
                               std::string_view order,
                               const std::optional<at::Tensor>& priority,
                               std::string_view overflow) {
  check_limit_capacity(indices, capacity, order, priority, overflow);
  return at::empty_symint(indices.sym_sizes(), indices.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("limit_capacity", &limit_capacity_meta);
}

}  // namespace torchmoe

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/choices.h"
#include "cpu/tensors.h"
#include "ops/limit_capacity.h"

namespace torchmoe {

namespace {

/// Calls serve(slot) for every slot in the order that they are served.
template <typename Serve>
void in_order(CapacityOrder order, int64_t num_tokens, int64_t top_k, const Serve& serve) {
  if (order == CapacityOrder::token) {
    for (int64_t slot = 0; slot < num_tokens * top_k; ++slot) {
      serve(slot);
    }
    return;
  }
  for (int64_t j = 0; j < top_k; ++j) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      serve(t * top_k + j);
    }
  }
}

/// The same with larger priorities first and NaN last; the stable sort leaves equal ones in
/// `order`.
template <typename Serve>
void in_priority_order(const double* priority,
                       CapacityOrder order,
                       int64_t num_tokens,
                       int64_t top_k,
                       const Serve& serve) {
  std::vector<int64_t> slots;
  slots.reserve(num_tokens * top_k);
  in_order(order, num_tokens, top_k, [&](int64_t slot) { slots.push_back(slot); });
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) {
    return priority[a] > priority[b] || (std::isnan(priority[b]) && !std::isnan(priority[a]));
  });
  std::for_each(slots.begin(), slots.end(), serve);
}

void limit_capacity_kernel_impl(const int64_t* indices,
                                const int64_t* capacity,
                                const double* priority,
                                CapacityOrder order,
                                int64_t num_tokens,
                                int64_t top_k,
                                int64_t num_experts,
                                int64_t* limited) {
  std::vector<int64_t> taken(num_experts, 0);
  const auto serve = [&](int64_t slot) {
    const int64_t expert = indices[slot];
    const bool kept = expert >= 0 && expert < num_experts && taken[expert] < capacity[expert];
    if (kept) {
      ++taken[expert];
    }
    limited[slot] = kept ? expert : -1;
  };
  if (priority == nullptr) {
    in_order(order, num_tokens, top_k, serve);
  } else {
    in_priority_order(priority, order, num_tokens, top_k, serve);
  }
}

at::Tensor limit_capacity_kernel(const at::Tensor& indices,
                                 const at::Tensor& capacity,
                                 std::string_view order,
                                 const std::optional<at::Tensor>& priority,
                                 std::string_view overflow) {
  check_limit_capacity(indices, capacity, order, priority, overflow);
  const auto indices_c = indices.contiguous();
  const auto capacity_c = capacity.contiguous();
  // float64 holds every other floating type exactly, so one instance ranks them all.
  const auto priority_c = cpu::contiguous_as(priority, at::kDouble);
  auto limited = at::empty(indices.sizes(), indices.options());
  limit_capacity_kernel_impl(indices_c.const_data_ptr<int64_t>(),
                             capacity_c.const_data_ptr<int64_t>(),
                             cpu::data_or_null<double>(priority_c),
                             choose_order("limit_capacity", order),
                             indices.size(0),
                             indices.size(1),
                             capacity.size(0),
                             limited.mutable_data_ptr<int64_t>());
  return limited;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("limit_capacity", &limit_capacity_kernel);
}

}  // namespace torchmoe

#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/dispatch_plan.h"

namespace torchmoe {

namespace {

/// A counting sort in three passes over the slots: count, prefix sum, place in slot order. Bucket E
/// holds the unrouted slots.
void dispatch_plan_kernel_impl(const int64_t* indices,
                               int64_t num_slots,
                               int64_t num_experts,
                               int64_t* expert_offsets,
                               int64_t* row_to_slot,
                               int64_t* slot_to_row) {
  const auto bucket = [&](int64_t slot) {
    const int64_t expert = indices[slot];
    return expert >= 0 && expert < num_experts ? expert : num_experts;
  };
  std::vector<int64_t> next_row(num_experts + 2, 0);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    ++next_row[bucket(slot) + 1];
  }
  for (int64_t e = 0; e <= num_experts; ++e) {
    next_row[e + 1] += next_row[e];
    expert_offsets[e] = next_row[e];
  }
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int64_t row = next_row[bucket(slot)]++;
    row_to_slot[row] = slot;
    slot_to_row[slot] = row;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatch_plan_kernel(const at::Tensor& indices,
                                                                    int64_t num_experts) {
  check_dispatch_plan(indices, num_experts);
  const auto indices_c = indices.contiguous();
  auto expert_offsets = at::empty({num_experts + 1}, indices.options());
  auto row_to_slot = at::empty({indices.numel()}, indices.options());
  auto slot_to_row = at::empty(indices.sizes(), indices.options());
  dispatch_plan_kernel_impl(indices_c.const_data_ptr<int64_t>(),
                            indices.numel(),
                            num_experts,
                            expert_offsets.mutable_data_ptr<int64_t>(),
                            row_to_slot.mutable_data_ptr<int64_t>(),
                            slot_to_row.mutable_data_ptr<int64_t>());
  return {expert_offsets, row_to_slot, slot_to_row};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("dispatch_plan", &dispatch_plan_kernel);
}

}  // namespace torchmoe

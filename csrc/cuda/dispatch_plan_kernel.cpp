#include "cuda/dispatch_plan_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "ops/dispatch_plan.h"

namespace torchmoe {

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatch_plan_kernel(const at::Tensor& indices,
                                                                    int64_t num_experts) {
  check_dispatch_plan(indices, num_experts);
  const cuda::OnDevice device(indices);
  const auto indices_c = indices.contiguous();
  const int64_t num_slots = indices.numel();
  const cuda::SlotTiles tiles(num_slots);
  auto counts = at::zeros({num_experts + 1, tiles.num_tiles}, indices.options());
  auto expert_offsets = at::empty({num_experts + 1}, indices.options());
  auto row_to_slot = at::empty({num_slots}, indices.options());
  auto slot_to_row = at::empty(indices.sizes(), indices.options());
  cuda::dispatch_plan(device.stream(),
                      {.tiles = tiles,
                       .num_experts = num_experts,
                       .experts = indices_c.const_data_ptr<int64_t>(),
                       .serving = nullptr,
                       .counts = counts.mutable_data_ptr<int64_t>()},
                      expert_offsets.mutable_data_ptr<int64_t>(),
                      row_to_slot.mutable_data_ptr<int64_t>(),
                      slot_to_row.mutable_data_ptr<int64_t>());
  return {expert_offsets, row_to_slot, slot_to_row};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("dispatch_plan", &dispatch_plan_kernel);
}

}  // namespace torchmoe

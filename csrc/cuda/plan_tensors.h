// From the plan's tensors to the pointers that kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/plan.h"
#include "ops/dispatch_plan.h"

namespace torchmoe::cuda {

/// Holds contiguous plan tensors and points into them.
class PlanTensors {
 public:
  explicit PlanTensors(const DispatchPlan& plan)
      : expert_offsets_(plan.expert_offsets.contiguous()),
        row_to_slot_(plan.row_to_slot.contiguous()),
        slot_to_row_(plan.slot_to_row.contiguous()) {}

  const at::Tensor& expert_offsets() const { return expert_offsets_; }

  Plan plan() const {
    return {expert_offsets_.const_data_ptr<int64_t>() + expert_offsets_.numel() - 1,
            row_to_slot_.const_data_ptr<int64_t>(),
            slot_to_row_.const_data_ptr<int64_t>(),
            slot_to_row_.size(0),
            slot_to_row_.size(1)};
  }

 private:
  at::Tensor expert_offsets_;
  at::Tensor row_to_slot_;
  at::Tensor slot_to_row_;
};

}  // namespace torchmoe::cuda

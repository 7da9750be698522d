// From the plan's tensors to what kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/plan_view.h"
#include "cpu/gemm/blocks.h"
#include "ops/dispatch_plan.h"

namespace torchmoe::cpu {

/// Holds contiguous plan tensors and the views over them.
class PlanReader {
 public:
  explicit PlanReader(const DispatchPlan& plan)
      : row_to_slot_(plan.row_to_slot.contiguous()),
        slot_to_row_(plan.slot_to_row.contiguous()),
        offsets_(read_offsets(plan.expert_offsets, plan.row_to_slot.numel())) {
    // A plan's first expert starts at row 0. Were it to start later, rows before it would count as
    // routed and be read without having been written.
    offsets_.front() = 0;
  }

  /// Expert e's rows are offsets()[e] .. offsets()[e + 1].
  const Offsets& offsets() const { return offsets_; }

  PlanView view() const {
    return {row_to_slot_.const_data_ptr<int64_t>(),
            slot_to_row_.const_data_ptr<int64_t>(),
            slot_to_row_.size(0),
            slot_to_row_.size(1),
            offsets_.back()};
  }

 private:
  at::Tensor row_to_slot_;
  at::Tensor slot_to_row_;
  Offsets offsets_;
};

}  // namespace torchmoe::cpu

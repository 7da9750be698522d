// The plan's tensors as kernels get them: how many rows are routed is known on the device only.
#pragma once

#include "common/plan_view.h"

namespace torchmoe::cuda {

/// Pointers to contiguous plan tensors.
struct Plan {
  const int64_t* num_routed;   // the last of expert_offsets [E + 1]
  const int64_t* row_to_slot;  // [N]
  const int64_t* slot_to_row;  // [T, K]
  int64_t num_tokens;
  int64_t top_k;

  TORCHMOE_HOST_DEVICE int64_t num_rows() const { return num_tokens * top_k; }

  TORCHMOE_HOST_DEVICE PlanView view() const {
    const int64_t given = *num_routed;
    const int64_t routed = given < 0 ? 0 : given > num_rows() ? num_rows() : given;
    return {row_to_slot, slot_to_row, num_tokens, top_k, routed};
  }
};

}  // namespace torchmoe::cuda

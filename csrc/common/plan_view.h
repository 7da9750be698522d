// The dispatch plan as kernels read it, on the host and on the device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace torchmoe {

/// Rows from num_routed on are unrouted. A slot or row number outside its range counts as not
/// routed, so that a bad plan gives a defined result.
struct PlanView {
  const int64_t* row_to_slot;  // [N]
  const int64_t* slot_to_row;  // [T, K]
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_routed;

  TORCHMOE_HOST_DEVICE int64_t num_rows() const { return num_tokens * top_k; }
  /// The slot of a routed row, or -1. A slot that names another row is not this row's: two rows
  /// never share one, and no two threads write to it.
  TORCHMOE_HOST_DEVICE int64_t slot_of(int64_t row) const {
    const int64_t slot = row < num_routed ? row_to_slot[row] : -1;
    return slot >= 0 && slot < num_rows() && slot_to_row[slot] == row ? slot : -1;
  }
  /// The row of a routed slot, or -1.
  TORCHMOE_HOST_DEVICE int64_t row_of(int64_t slot) const {
    const int64_t row = slot_to_row[slot];
    return row >= 0 && row < num_routed && row_to_slot[row] == slot ? row : -1;
  }
};

}  // namespace torchmoe

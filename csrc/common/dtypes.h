// The type that sums are formed in.
#pragma once

#include <c10/core/ScalarType.h>

namespace torchmoe {

/// float64 for float64, else float32: the dtype of logits, gate weights and losses, and of every
/// accumulation.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace torchmoe

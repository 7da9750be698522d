// The launcher of dispatch_plan.
#pragma once

#include <cstdint>

#include "cuda/counting_sort.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

/// The slots of `sort`, in slot order -> expert_offsets [E + 1], row_to_slot [N], slot_to_row [N]
void dispatch_plan(Stream stream,
                   const CountingSort& sort,
                   int64_t* expert_offsets,
                   int64_t* row_to_slot,
                   int64_t* slot_to_row);

}  // namespace torchmoe::cuda

// The launchers of limit_capacity; reroute.h has the one for slots that may go elsewhere.
#pragma once

#include <cstdint>

#include "cuda/counting_sort.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

/// limited[slot] = indices[slot] where that is in [0, E), else -1.
void keep_routed(Stream stream,
                 int64_t num_slots,
                 int64_t num_experts,
                 const int64_t* indices,
                 int64_t* limited);

/// limited[slot] = its expert, for the first capacity[e] of each expert's slots, else -1.
void drop_overflow(Stream stream,
                   const CountingSort& sort,
                   const int64_t* capacity,
                   int64_t* limited);

}  // namespace torchmoe::cuda

// limit_capacity for overflow "next_best" and "backup".
#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>

#include "cuda/serving_order.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

// One block serves all slots.
constexpr int kRerouteThreads = 1024;
constexpr int kRerouteWarps = kRerouteThreads / 32;

struct RerouteScratch {
  int64_t* room;          // [E], what is left before the present chunk
  int64_t* full_from;     // [E], the position from which on an expert is known to be full
  int64_t* marks;         // [kRerouteWarps, E], zero
  unsigned char* takers;  // [E, kRerouteWarps], zero, 8-byte aligned
};

/// T is the stored type of the scores.
template <typename T>
struct Rerouting {
  SlotSizes sizes;
  int64_t num_experts;
  const int64_t* capacity;              // [E]
  const T* scores;                      // [T, E]
  const at::opmath_type<T>* tie_break;  // [T, E] or null
  const int64_t* backup;                // [E] or null
  const int64_t* serving;               // [N], the slots as they are served; null: slot order
  const int64_t* positions;             // [N], the inverse; null with it
  int64_t* limited;  // [T, K], in: the expert in [0, E) that a slot asks for, else -1

  RerouteScratch scratch;
};

template <typename T>
void reroute_overflow(Stream stream, const Rerouting<T>& rerouting);

}  // namespace torchmoe::cuda

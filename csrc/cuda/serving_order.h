// The order in which limit_capacity serves the slots.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/vocabulary.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

struct SlotSizes {
  int64_t num_tokens;
  int64_t top_k;

  constexpr int64_t num_slots() const { return num_tokens * top_k; }
};

/// An integer that holds a priority's rank.
template <typename T>
using RankKey = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

/// priority [T, K] -> keys [N], in the places that the slots have by `order` alone: in ascending
/// order, equal ones in theirs, they are in the order of service.
template <typename T>
void rank_keys(Stream stream,
               const SlotSizes& sizes,
               CapacityOrder order,
               const T* priority,
               RankKey<T>* keys);

/// serving [N] = the slots as they are served, positions [N] its inverse. ranked [N]:
/// the places by `order` alone as they are served; null where they are so already.
void order_slots(Stream stream,
                 const SlotSizes& sizes,
                 CapacityOrder order,
                 const int64_t* ranked,
                 int64_t* serving,
                 int64_t* positions);

}  // namespace torchmoe::cuda

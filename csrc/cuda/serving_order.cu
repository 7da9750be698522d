#include "cuda/serving_order.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <ATen/OpMathType.h>

#include "common/float_types.h"
#include "cuda/launch.h"

namespace torchmoe::cuda {

namespace {

constexpr int kThreads = 256;

int64_t blocks_for(int64_t num_slots) {
  return (num_slots + kThreads - 1) / kThreads;
}

__device__ int64_t thread_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ int64_t slot_at(const SlotSizes& sizes, CapacityOrder order, int64_t place) {
  return order == CapacityOrder::token
             ? place
             : place % sizes.num_tokens * sizes.top_k + place / sizes.num_tokens;
}

/// Ascending as ranks_before orders. The bits of a float ascend with its magnitude: negated they
/// put the larger positive number first, and without their sign the smaller negative one last.
template <typename Key, typename Acc>
__device__ Key rank_key(Acc priority) {
  static_assert(sizeof(Key) == sizeof(Acc));
  if (std::isnan(priority)) {
    return std::numeric_limits<Key>::max();
  }
  if (priority == Acc(0)) {
    return Key(-1);  // what 0.0 gets below, for -0.0 as well
  }
  Key bits = 0;
  std::memcpy(&bits, &priority, sizeof(bits));
  return bits >= 0 ? ~bits : bits & std::numeric_limits<Key>::max();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rank_keys_kernel(SlotSizes sizes, CapacityOrder order, const T* priority, RankKey<T>* keys) {
  const int64_t place = thread_in_grid();
  if (place < sizes.num_slots()) {
    keys[place] = rank_key<RankKey<T>>(
        static_cast<at::opmath_type<T>>(priority[slot_at(sizes, order, place)]));
  }
}

__global__ void __launch_bounds__(kThreads) order_slots_kernel(SlotSizes sizes,
                                                               CapacityOrder order,
                                                               const int64_t* ranked,
                                                               int64_t* serving,
                                                               int64_t* positions) {
  const int64_t position = thread_in_grid();
  if (position >= sizes.num_slots()) {
    return;
  }
  const int64_t slot = slot_at(sizes, order, ranked == nullptr ? position : ranked[position]);
  serving[position] = slot;
  positions[slot] = position;
}

}  // namespace

template <typename T>
void rank_keys(Stream stream,
               const SlotSizes& sizes,
               CapacityOrder order,
               const T* priority,
               RankKey<T>* keys) {
  launch(stream,
         blocks_for(sizes.num_slots()),
         kThreads,
         0,
         rank_keys_kernel<T>,
         sizes,
         order,
         priority,
         keys);
}

void order_slots(Stream stream,
                 const SlotSizes& sizes,
                 CapacityOrder order,
                 const int64_t* ranked,
                 int64_t* serving,
                 int64_t* positions) {
  launch(stream,
         blocks_for(sizes.num_slots()),
         kThreads,
         0,
         order_slots_kernel,
         sizes,
         order,
         ranked,
         serving,
         positions);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...) \
  template void rank_keys(Stream, const SlotSizes&, CapacityOrder, const T*, RankKey<T>*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda

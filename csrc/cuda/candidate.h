// The order that experts compete in for a token, a warp looking for the first.
#pragma once

#include <cstdint>
#include <limits>

#include "common/rank.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

/// An expert and its score, in the accumulation type; tie_break is 0 for all where nothing decides
/// between equal ones.
template <typename T>
struct Candidate {
  Ranked<T> score;
  int64_t expert;

  /// After every expert, also one whose score is NaN.
  __device__ static Candidate none() {
    constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
    return {{kNan, kNan}, std::numeric_limits<int64_t>::max()};
  }
  /// Before every expert, also one whose score is inf.
  __device__ static Candidate start() {
    constexpr T kInf = std::numeric_limits<T>::infinity();
    return {{kInf, kInf}, -1};
  }

  __device__ bool exists() const { return expert != std::numeric_limits<int64_t>::max(); }
};

/// ranks_before, ties to the lower id: a total order.
template <typename T>
__device__ bool comes_before(const Candidate<T>& a, const Candidate<T>& b) {
  return ranks_before(a.score, b.score) || (!ranks_before(b.score, a.score) && a.expert < b.expert);
}

/// The first of the lanes' candidates, in every lane.
template <typename T>
__device__ Candidate<T> first_of_warp(Candidate<T> mine) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Candidate<T> other{{__shfl_xor_sync(kAllLanes, mine.score.score, distance),
                              __shfl_xor_sync(kAllLanes, mine.score.tie_break, distance)},
                             __shfl_xor_sync(kAllLanes, mine.expert, distance)};
    if (comes_before(other, mine)) {
      mine = other;
    }
  }
  return mine;
}

}  // namespace torchmoe::cuda

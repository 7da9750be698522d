// The score functions over one token's logits, a warp to a token: shared by gate_weights and the
// router's losses. A logit's score is computed again wherever it is needed, since a token may have
// more experts than a warp has registers for.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/sigmoid.h"
#include "common/vocabulary.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

// Four tokens to a block keep the multiprocessors full without tying many tokens together.
constexpr int kTokenThreads = 4 * kWarpSize;

/// The blocks in which warp_in_grid() is a token's number.
inline int64_t blocks_of_tokens(int64_t num_tokens) {
  constexpr int64_t kTokens = kTokenThreads / kWarpSize;
  return (num_tokens + kTokens - 1) / kTokens;
}

/// The sum of values(0) .. values(size - 1), in every lane.
template <typename T, typename Values>
__device__ T sum_of(int64_t size, const Values& values) {
  T sum = 0;
  for (int64_t i = lane_id(); i < size; i += kWarpSize) {
    sum += values(i);
  }
  return warp_sum(sum);
}

/// The largest of values(0) .. values(size - 1), -inf for none; a NaN among them is the result, so
/// that it is not lost.
template <typename T, typename Values>
__device__ T largest(int64_t size, const Values& values) {
  const auto larger = [](T a, T b) { return a > b || std::isnan(a) ? a : b; };
  T result = -std::numeric_limits<T>::infinity();
  for (int64_t i = lane_id(); i < size; i += kWarpSize) {
    result = larger(values(i), result);
  }
  return warp_reduce(result, larger);
}

/// The score of a token's logits, as a fraction q / sum: q is exp(logit - shift), shift being the
/// largest logit and q 0 where all are -inf, or the sigmoid over exp(shift) (see sigmoid_shift).
template <typename T>
struct Score {
  ScoreFunction function;
  T shift;
  T sum;

  /// The score function over all `size` logits: a sigmoid is not divided.
  template <typename Logits>
  __device__ static Score over(ScoreFunction function, int64_t size, const Logits& logits) {
    return function == ScoreFunction::softmax ? shares(function, size, logits)
                                              : Score{function, T(0), T(1)};
  }

  /// The same divided by its sum over the `size` logits; a sum of 0 gives 0. A logit of -inf adds
  /// nothing.
  template <typename Logits>
  __device__ static Score shares(ScoreFunction function, int64_t size, const Logits& logits) {
    Score score{function, T(0), T(1)};
    const T top = largest<T>(size, logits);
    score.shift = function == ScoreFunction::softmax ? top : sigmoid_shift(top);
    const T sum = sum_of<T>(size, [&](int64_t i) { return score.numerator(logits(i)); });
    score.sum = sum == T(0) ? T(1) : sum;
    return score;
  }

  __device__ T numerator(T logit) const {
    if (function == ScoreFunction::sigmoid) {
      return shifted_sigmoid(logit, shift);
    }
    return shift == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(logit - shift);
  }
  __device__ T operator()(T logit) const { return numerator(logit) / sum; }

  /// The derivative of log q: 1 for exp, 1 - q for the sigmoid.
  __device__ T slope(T logit) const {
    return function == ScoreFunction::sigmoid ? T(1) - sigmoid(logit) : T(1);
  }
};

}  // namespace torchmoe::cuda

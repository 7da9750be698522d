// The logistic function, a score function and the heart of silu.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"

namespace torchmoe {

/// 1 / (1 + exp(-u)); exp of a large -u overflows to inf and gives 0, as it should.
template <typename T>
TORCHMOE_HOST_DEVICE T sigmoid(T u) {
  return T(1) / (T(1) + std::exp(-u));
}

/// The value subtracted from the logarithms of sigmoids before these are divided by their sum: the
/// largest logit if all are so low that the sum underflows or nearly does, else 0. NaN and -inf,
/// from which nothing can be subtracted, give 0.
template <typename T>
TORCHMOE_HOST_DEVICE T sigmoid_shift(T largest) {
  // float32 has room for another e^-56 below: a logit that far under the largest has no share.
  constexpr T kLow = -32;
  return largest < kLow && largest > -std::numeric_limits<T>::infinity() ? largest : T(0);
}

/// sigmoid(u) / exp(shift), for the shift of logits that u is one of.
template <typename T>
TORCHMOE_HOST_DEVICE T shifted_sigmoid(T u, T shift) {
  return shift == T(0) ? sigmoid(u) : std::exp(u - shift) / (T(1) + std::exp(u));
}

}  // namespace torchmoe

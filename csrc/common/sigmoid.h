// The logistic function, a score function and the heart of silu.
#pragma once

#include <cmath>

#include "host_device.h"

namespace torchmoe {

/// 1 / (1 + exp(-u)); exp of a large -u overflows to inf and gives 0, as it should.
template <typename T>
TORCHMOE_HOST_DEVICE T sigmoid(T u) {
  return T(1) / (T(1) + std::exp(-u));
}

}  // namespace torchmoe

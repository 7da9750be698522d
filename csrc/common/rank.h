// The order that scores and priorities rank in: one for selection, rerouting and dropping.
#pragma once

#include <cmath>

#include "host_device.h"

namespace torchmoe {

/// Whether a ranks strictly before b: larger first, NaN after everything, -inf included.
template <typename T>
TORCHMOE_HOST_DEVICE bool ranks_before(T a, T b) {
  return a > b || (std::isnan(b) && !std::isnan(a));
}

}  // namespace torchmoe

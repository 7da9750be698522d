// The order that scores and priorities rank in: one for selection, rerouting and dropping, on every
// device.
#pragma once

#include <cmath>

#include "host_device.h"

namespace torchmoe {

/// Whether a ranks strictly before b: larger first, NaN after everything, -inf included.
template <typename T>
TORCHMOE_HOST_DEVICE bool ranks_before(T a, T b) {
  return a > b || (std::isnan(b) && !std::isnan(a));
}

/// A score and what decides between equal scores, such as the logit that it was formed from:
/// probabilities that have underflowed, or that a bias has absorbed, are equal where logits are not.
template <typename T>
struct Ranked {
  T score;
  T tie_break;
};

/// By score, then by tie_break, in the same order.
template <typename T>
TORCHMOE_HOST_DEVICE bool ranks_before(const Ranked<T>& a, const Ranked<T>& b) {
  return ranks_before(a.score, b.score) ||
         (!ranks_before(b.score, a.score) && ranks_before(a.tie_break, b.tie_break));
}

}  // namespace torchmoe

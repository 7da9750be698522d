// The experts' activation over rows of their pre-activation.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/parallel.h"

namespace torchmoe::cpu {

/// act[r] = activation(pre[r]): pre [rows, P] -> act [rows, I]; P is 2I for gated activations.
template <typename T>
void activate_rows(
    Activation activation, const T* pre, T* act, int64_t num_rows, int64_t intermediate) {
  const bool gated = is_gated(activation);
  const int64_t pre_width = gated ? 2 * intermediate : intermediate;
  with_nonlinearity(activation, [&](auto f) {
    parallel_items(num_rows, pre_width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = pre + r * pre_width;
        const T* up = gate + intermediate;
        T* out = act + r * intermediate;
        for (int64_t i = 0; i < intermediate; ++i) {
          const T value = activate<f()>(gate[i]);
          out[i] = gated ? value * up[i] : value;
        }
      }
    });
  });
}

}  // namespace torchmoe::cpu

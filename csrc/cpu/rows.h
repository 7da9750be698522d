// Moving tokens into expert order and back: the arithmetic shared by permute, unpermute and
// expert_mlp.
//
// T is the stored type, Acc the type that sums are formed in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/plan_view.h"
#include "cpu/parallel.h"

namespace torchmoe::cpu {

/// rows[r] = x[token of row r], 0 for unrouted rows: x [T, width] -> rows [N, width].
template <typename T>
void gather_rows(const PlanView& plan, const T* x, T* rows, int64_t width) {
  parallel_items(plan.num_rows(), width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = plan.slot_of(r);
      T* out = rows + r * width;
      if (slot < 0) {
        std::fill(out, out + width, T(0));
      } else {
        std::copy_n(x + slot / plan.top_k * width, width, out);
      }
    }
  });
}

/// y[t] = sum over routed slots, in slot order, of weights[t, j] * rows[row of the slot]; null
/// weights count as 1.
template <typename Acc, typename In, typename Out>
void combine_rows(const PlanView& plan, const In* rows, const Acc* weights, Out* y, int64_t width) {
  parallel_items(plan.num_tokens, plan.top_k * width, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sum(width);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), Acc(0));
      for (int64_t slot = t * plan.top_k; slot < (t + 1) * plan.top_k; ++slot) {
        const int64_t row = plan.row_of(slot);
        if (row < 0) {
          continue;
        }
        const Acc weight = weights == nullptr ? Acc(1) : weights[slot];
        const In* in = rows + row * width;
        for (int64_t h = 0; h < width; ++h) {
          sum[h] += weight * static_cast<Acc>(in[h]);
        }
      }
      std::transform(
          sum.begin(), sum.end(), y + t * width, [](Acc value) { return static_cast<Out>(value); });
    }
  });
}

/// <a, b>, summed in 16 interleaved lanes that are added in order: independent lanes let the
/// compiler use vector registers without reordering a sum.
template <typename Acc, typename A, typename B>
Acc dot(const A* a, const B* b, int64_t size) {
  constexpr int64_t kLanes = 16;
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<Acc>(a[i + lane]) * static_cast<Acc>(b[i + lane]);
    }
  }
  for (; i < size; ++i) {
    lanes[i % kLanes] += static_cast<Acc>(a[i]) * static_cast<Acc>(b[i]);
  }
  Acc sum = 0;
  for (const Acc lane : lanes) {
    sum += lane;
  }
  return sum;
}

}  // namespace torchmoe::cpu

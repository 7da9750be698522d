// Moving tokens into expert order and back: the arithmetic shared by permute, unpermute and
// expert_mlp.
//
// T is the stored type, Acc the type that sums are formed in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/plan_view.h"
#include "cpu/elements.h"
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

/// A token's routed slots, in slot order: their rows, and their weights or 1.
template <typename Acc, typename In>
class TokenRows {
 public:
  explicit TokenRows(const PlanView& plan) : rows_(plan.top_k), weights_(plan.top_k) {}

  void find(
      const PlanView& plan, int64_t token, const In* rows, const Acc* weights, int64_t width) {
    count_ = 0;
    for (int64_t slot = token * plan.top_k; slot < (token + 1) * plan.top_k; ++slot) {
      if (const int64_t row = plan.row_of(slot); row >= 0) {
        rows_[count_] = rows + row * width;
        weights_[count_++] = weights == nullptr ? Acc(1) : weights[slot];
      }
    }
  }

  int64_t count() const { return count_; }
  const In* const* rows() const { return rows_.data(); }
  const Acc* weights() const { return weights_.data(); }

 private:
  int64_t count_ = 0;
  std::vector<const In*> rows_;
  std::vector<Acc> weights_;
};

/// out [width] = the sum of the token's rows. `next` are those of the next token.
template <typename Acc, typename In, typename Out>
void sum_rows(const TokenRows<Acc, In>& token,
              const TokenRows<Acc, In>& next,
              Out* out,
              int64_t width,
              Acc* sum) {
  if constexpr (std::is_same_v<In, float>) {
    return simd().weighted_sum({token.count(),
                                token.rows(),
                                token.weights(),
                                width,
                                numbers(out),
                                next.count(),
                                next.rows()});
  }
  std::fill_n(sum, width, Acc(0));
  for (int64_t i = 0; i < token.count(); ++i) {
    for (int64_t h = 0; h < width; ++h) {
      sum[h] += token.weights()[i] * static_cast<Acc>(token.rows()[i][h]);
    }
  }
  std::transform(sum, sum + width, out, [](Acc value) { return static_cast<Out>(value); });
}

/// y[t] = sum over routed slots, in slot order, of weights[t, j] * rows[row of the slot]; null
/// weights count as 1.
template <typename Acc, typename In, typename Out>
void combine_rows(const PlanView& plan, const In* rows, const Acc* weights, Out* y, int64_t width) {
  parallel_items(plan.num_tokens, plan.top_k * width, [&](int64_t begin, int64_t end) {
    TokenRows<Acc, In> token(plan);
    TokenRows<Acc, In> next(plan);
    std::vector<Acc> sum(width);
    next.find(plan, begin, rows, weights, width);
    for (int64_t t = begin; t < end; ++t) {
      std::swap(token, next);
      next.find(plan, std::min(t + 1, end - 1), rows, weights, width);
      sum_rows(token, next, y + t * width, width, sum.data());
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

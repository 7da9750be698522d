// The score functions over one token's logits, shared by gate_weights and the router's losses, and
// their derivatives.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/sigmoid.h"
#include "common/vocabulary.h"
#include "cpu/simd/simd.h"

namespace torchmoe::cpu {

/// The largest value, -inf for none; a NaN among them is the result, so that it is not lost.
template <typename T>
T largest(int64_t size, const T* values) {
  T result = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] > result || std::isnan(values[i])) {
      result = values[i];
    }
  }
  return result;
}

/// out[i] = exp(values[i]) / sum of exp, 0 where every value is -inf; the largest is subtracted
/// first. out may be values.
template <typename T>
void softmax(int64_t size, const T* values, T* out) {
  constexpr int64_t kFew = 4;  // are done before a vector's elements are added up
  if constexpr (std::is_same_v<T, float>) {
    if (size > kFew) {
      return simd().softmax({size, values, out});
    }
  }
  const T top = largest(size, values);
  const bool empty = top == -std::numeric_limits<T>::infinity();
  T sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    out[i] = empty ? T(0) : std::exp(values[i] - top);
    sum += out[i];
  }
  for (int64_t i = 0; !empty && i < size; ++i) {
    out[i] /= sum;
  }
}

/// probs = score_function(logits)
template <typename T>
void score_row(ScoreFunction score_function, const T* logits, int64_t num_experts, T* probs) {
  if (score_function == ScoreFunction::softmax) {
    softmax(num_experts, logits, probs);
    return;
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    probs[e] = sigmoid(logits[e]);
  }
}

/// The scores of some logits up to a factor, with which they do not all underflow: the softmax, or
/// sigmoids moved by sigmoid_shift. out may be logits.
template <typename T>
void relative_scores(ScoreFunction score_function, int64_t size, const T* logits, T* out) {
  if (score_function == ScoreFunction::softmax) {
    softmax(size, logits, out);
    return;
  }
  const T shift = sigmoid_shift(largest(size, logits));
  for (int64_t i = 0; i < size; ++i) {
    out[i] = shifted_sigmoid(logits[i], shift);
  }
}

/// The values over their sum; zeros stay.
template <typename T>
void divide_by_sum(int64_t size, T* values) {
  T sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    sum += values[i];
  }
  for (int64_t i = 0; sum != T(0) && i < size; ++i) {
    values[i] /= sum;
  }
}

/// The derivative of log q at a logit, q being exp(logit) or the sigmoid.
template <typename T>
T log_slope(ScoreFunction score_function, T logit) {
  return score_function == ScoreFunction::sigmoid ? T(1) - sigmoid(logit) : T(1);
}

/// grad_logits = J^T grad_probs, J being the derivative of score_function at probs.
template <typename T>
void score_row_backward(ScoreFunction score_function,
                        const T* probs,
                        const T* grad_probs,
                        int64_t num_experts,
                        T* grad_logits) {
  if (score_function == ScoreFunction::sigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) {
      grad_logits[e] = grad_probs[e] * probs[e] * (T(1) - probs[e]);
    }
    return;
  }
  T mean = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    mean += probs[e] * grad_probs[e];
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    grad_logits[e] = probs[e] * (grad_probs[e] - mean);
  }
}

}  // namespace torchmoe::cpu

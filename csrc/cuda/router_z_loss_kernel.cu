#include "cuda/router_z_loss_kernel.h"

#include "common/float_types.h"
#include "cuda/score.h"

namespace torchmoe::cuda {

namespace {

/// The softmax over one token's logits.
template <typename T>
__device__ Score<at::opmath_type<T>> softmax_of(const T* logits, int64_t num_experts) {
  using Acc = at::opmath_type<T>;
  return Score<Acc>::over(
      ScoreFunction::softmax, num_experts, [&](int64_t e) { return static_cast<Acc>(logits[e]); });
}

template <typename T>
__device__ T logsumexp(const Score<T>& softmax) {
  return std::isinf(softmax.shift) ? softmax.shift : softmax.shift + std::log(softmax.sum);
}

template <typename T>
__global__ void __launch_bounds__(kTokenThreads) squared_logsumexp_kernel(int64_t num_tokens,
                                                                          int64_t num_experts,
                                                                          const T* logits,
                                                                          double* squares) {
  const int64_t token = warp_in_grid();
  if (token >= num_tokens) {
    return;
  }
  const double z = logsumexp(softmax_of(logits + token * num_experts, num_experts));
  if (lane_id() == 0) {
    squares[token] = z * z;
  }
}

/// d lse^2 / d logits = 2 lse softmax(logits), over the number of counted tokens.
template <typename T>
__global__ void __launch_bounds__(kTokenThreads)
    squared_logsumexp_backward_kernel(int64_t num_tokens,
                                      int64_t num_experts,
                                      const at::opmath_type<T>* grad,
                                      const T* logits,
                                      const bool* token_mask,
                                      TokenCounts counts,
                                      T* grad_logits) {
  using Acc = at::opmath_type<T>;
  const int64_t token = warp_in_grid();
  if (token >= num_tokens) {
    return;
  }
  const T* row = logits + token * num_experts;
  T* out = grad_logits + token * num_experts;
  if (token_mask != nullptr && !token_mask[token]) {
    for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
      out[e] = T(0);
    }
    return;
  }
  const auto softmax = softmax_of(row, num_experts);
  const Acc lse = logsumexp(softmax);
  const auto scale = static_cast<Acc>(2.0 * static_cast<double>(*grad) / counts.of(0));
  // Logits that are all -inf have softmax 0 and cannot be moved: no gradient, instead of inf * 0.
  const Acc factor = std::isinf(lse) && lse < Acc(0) ? Acc(0) : scale * lse;
  for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
    out[e] = static_cast<T>(factor * softmax(static_cast<Acc>(row[e])));
  }
}

}  // namespace

template <typename T>
void squared_logsumexp(
    Stream stream, int64_t num_tokens, int64_t num_experts, const T* logits, double* squares) {
  launch(stream,
         blocks_of_tokens(num_tokens),
         kTokenThreads,
         0,
         squared_logsumexp_kernel<T>,
         num_tokens,
         num_experts,
         logits,
         squares);
}

template <typename T>
void squared_logsumexp_backward(Stream stream,
                                int64_t num_tokens,
                                int64_t num_experts,
                                const at::opmath_type<T>* grad,
                                const T* logits,
                                const bool* token_mask,
                                const TokenCounts& counts,
                                T* grad_logits) {
  launch(stream,
         blocks_of_tokens(num_tokens),
         kTokenThreads,
         0,
         squared_logsumexp_backward_kernel<T>,
         num_tokens,
         num_experts,
         grad,
         logits,
         token_mask,
         counts,
         grad_logits);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...)                                            \
  template void squared_logsumexp(Stream, int64_t, int64_t, const T*, double*); \
  template void squared_logsumexp_backward(Stream,                              \
                                           int64_t,                             \
                                           int64_t,                             \
                                           const at::opmath_type<T>*,           \
                                           const T*,                            \
                                           const bool*,                         \
                                           const TokenCounts&,                  \
                                           T*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda

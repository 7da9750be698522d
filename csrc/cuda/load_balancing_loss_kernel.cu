#include "cuda/load_balancing_loss_kernel.h"

#include "common/float_types.h"
#include "cuda/block_sum.h"
#include "cuda/score.h"

namespace torchmoe::cuda {

namespace {

// One block forms what all sequences share.
constexpr int kThreads = 1024;

template <typename T>
__device__ Score<at::opmath_type<T>> shares_of(ScoreFunction score_function,
                                               const T* logits,
                                               int64_t num_experts) {
  using Acc = at::opmath_type<T>;
  return Score<Acc>::shares(
      score_function, num_experts, [&](int64_t e) { return static_cast<Acc>(logits[e]); });
}

template <typename T>
__global__ void __launch_bounds__(kTokenThreads) score_shares_kernel(TokenSizes sizes,
                                                                     ScoreFunction score_function,
                                                                     const T* logits,
                                                                     at::opmath_type<T>* shares) {
  using Acc = at::opmath_type<T>;
  const int64_t token = warp_in_grid();
  if (token >= sizes.num_sequences * sizes.num_tokens) {
    return;
  }
  const int64_t num_experts = sizes.num_columns;
  const T* row = logits + token * num_experts;
  const auto share = shares_of(score_function, row, num_experts);
  for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
    shares[token * num_experts + e] = share(static_cast<Acc>(row[e]));
  }
}

/// How many sequences have a counted token.
__device__ double counted_sequences(int64_t num_sequences, const TokenCounts& counts) {
  double counted = 0;
  for (int64_t s = threadIdx.x; s < num_sequences; s += kThreads) {
    counted += counts.of(s) > 0 ? 1 : 0;
  }
  return block_sum<kThreads>(counted, 1);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) balance_of_sums_kernel(TokenSizes sizes,
                                                                   const double* share_sums,
                                                                   const Acc* fraction,
                                                                   TokenCounts counts,
                                                                   Acc* loss) {
  const int64_t num_experts = sizes.num_columns;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < sizes.num_sequences * num_experts; i += kThreads) {
    const double count = counts.of(i / num_experts);
    if (count > 0) {
      sum += static_cast<double>(fraction[i]) * share_sums[i] * static_cast<double>(num_experts) /
             count;
    }
  }
  sum = block_sum<kThreads>(sum, 1);
  const double counted = counted_sequences(sizes.num_sequences, counts);
  if (threadIdx.x == 0) {
    *loss = static_cast<Acc>(counted == 0 ? 0.0 : sum / counted);
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    balance_scales_kernel(TokenSizes sizes, const Acc* grad, TokenCounts counts, Acc* scales) {
  const double counted = counted_sequences(sizes.num_sequences, counts);
  for (int64_t s = threadIdx.x; s < sizes.num_sequences; s += kThreads) {
    scales[s] = static_cast<Acc>(static_cast<double>(*grad) *
                                 static_cast<double>(sizes.num_columns) / (counts.of(s) * counted));
  }
}

/// With q = p / sum p, d<f, q>/dlogit_i = q_i (f_i - <f, q>), times 1 - p_i for a sigmoid. In this
/// form nothing is divided by a small sum of p.
template <typename T>
__global__ void __launch_bounds__(kTokenThreads)
    score_shares_backward_kernel(TokenSizes sizes,
                                 ScoreFunction score_function,
                                 const at::opmath_type<T>* scales,
                                 const T* logits,
                                 const at::opmath_type<T>* fraction,
                                 const bool* token_mask,
                                 T* grad_logits) {
  using Acc = at::opmath_type<T>;
  const int64_t token = warp_in_grid();
  if (token >= sizes.num_sequences * sizes.num_tokens) {
    return;
  }
  const int64_t num_experts = sizes.num_columns;
  const T* row = logits + token * num_experts;
  T* out = grad_logits + token * num_experts;
  if (token_mask != nullptr && !token_mask[token]) {
    for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
      out[e] = T(0);
    }
    return;
  }
  const int64_t sequence = token / sizes.num_tokens;
  const auto* f = fraction + sequence * num_experts;
  const auto share = shares_of(score_function, row, num_experts);
  const Acc mean =
      sum_of<Acc>(num_experts, [&](int64_t e) { return f[e] * share(static_cast<Acc>(row[e])); });
  for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
    const auto logit = static_cast<Acc>(row[e]);
    out[e] = static_cast<T>(share(logit) * (scales[sequence] * (f[e] - mean) * share.slope(logit)));
  }
}

}  // namespace

template <typename T>
void score_shares(Stream stream,
                  const TokenSizes& sizes,
                  ScoreFunction score_function,
                  const T* logits,
                  at::opmath_type<T>* shares) {
  launch(stream,
         blocks_of_tokens(sizes.num_sequences * sizes.num_tokens),
         kTokenThreads,
         0,
         score_shares_kernel<T>,
         sizes,
         score_function,
         logits,
         shares);
}

template <typename Acc>
void balance_of_sums(Stream stream,
                     const TokenSizes& sizes,
                     const double* share_sums,
                     const Acc* fraction,
                     const TokenCounts& counts,
                     Acc* loss) {
  launch(stream,
         1,
         kThreads,
         0,
         balance_of_sums_kernel<Acc>,
         sizes,
         share_sums,
         fraction,
         counts,
         loss);
}

template <typename Acc>
void balance_scales(Stream stream,
                    const TokenSizes& sizes,
                    const Acc* grad,
                    const TokenCounts& counts,
                    Acc* scales) {
  launch(stream, 1, kThreads, 0, balance_scales_kernel<Acc>, sizes, grad, counts, scales);
}

template <typename T>
void score_shares_backward(Stream stream,
                           const TokenSizes& sizes,
                           ScoreFunction score_function,
                           const at::opmath_type<T>* scales,
                           const T* logits,
                           const at::opmath_type<T>* fraction,
                           const bool* token_mask,
                           T* grad_logits) {
  launch(stream,
         blocks_of_tokens(sizes.num_sequences * sizes.num_tokens),
         kTokenThreads,
         0,
         score_shares_backward_kernel<T>,
         sizes,
         score_function,
         scales,
         logits,
         fraction,
         token_mask,
         grad_logits);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...)                                            \
  template void score_shares(                                                   \
      Stream, const TokenSizes&, ScoreFunction, const T*, at::opmath_type<T>*); \
  template void score_shares_backward(Stream,                                   \
                                      const TokenSizes&,                        \
                                      ScoreFunction,                            \
                                      const at::opmath_type<T>*,                \
                                      const T*,                                 \
                                      const at::opmath_type<T>*,                \
                                      const bool*,                              \
                                      T*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
#define TORCHMOE_INSTANTIATE(Acc, ...)                                                 \
  template void balance_of_sums(                                                       \
      Stream, const TokenSizes&, const double*, const Acc*, const TokenCounts&, Acc*); \
  template void balance_scales(Stream, const TokenSizes&, const Acc*, const TokenCounts&, Acc*);
TORCHMOE_ACCUMULATE_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda

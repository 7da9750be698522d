#include "cuda/gate_weights_kernel.h"

#include "common/float_types.h"
#include "cuda/score.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

namespace {

/// One token's logits and slots.
template <typename T>
struct Token {
  using Acc = at::opmath_type<T>;

  const T* logits;
  const int64_t* indices;
  int64_t num_experts;
  int64_t top_k;

  __device__ Acc logit(int64_t expert) const { return static_cast<Acc>(logits[expert]); }
  __device__ bool is_routed(int64_t slot) const {
    return indices[slot] >= 0 && indices[slot] < num_experts;
  }
  __device__ int64_t num_routed() const {
    return sum_of<int64_t>(top_k, [&](int64_t j) { return is_routed(j) ? 1 : 0; });
  }
};

template <typename T>
__device__ Token<T> token_at(const GateSizes& sizes,
                             int64_t token,
                             const T* logits,
                             const int64_t* indices) {
  return {logits + token * sizes.num_experts,
          indices + token * sizes.top_k,
          sizes.num_experts,
          sizes.top_k};
}

/// What gives the weight of a routed slot from the logit of its expert.
template <typename T>
__device__ Score<at::opmath_type<T>> score_of(ScoreFunction score_function,
                                              Normalize normalize,
                                              const Token<T>& token) {
  using Acc = at::opmath_type<T>;
  if (normalize == Normalize::none) {
    return Score<Acc>::over(
        score_function, token.num_experts, [&](int64_t e) { return token.logit(e); });
  }
  // An unrouted slot adds nothing.
  return Score<Acc>::shares(score_function, token.top_k, [&](int64_t j) {
    return token.is_routed(j) ? token.logit(token.indices[j])
                              : -std::numeric_limits<Acc>::infinity();
  });
}

template <typename T>
__global__ void __launch_bounds__(kTokenThreads) gate_weights_kernel(GateSizes sizes,
                                                                     ScoreFunction score_function,
                                                                     Normalize normalize,
                                                                     const T* logits,
                                                                     const int64_t* indices,
                                                                     at::opmath_type<T>* weights) {
  using Acc = at::opmath_type<T>;
  const int64_t number = warp_in_grid();
  if (number >= sizes.num_tokens) {
    return;
  }
  const auto token = token_at(sizes, number, logits, indices);
  Acc* out = weights + number * sizes.top_k;
  if (normalize == Normalize::uniform) {
    const Acc share = Acc(1) / static_cast<Acc>(token.num_routed());
    for (int64_t j = lane_id(); j < token.top_k; j += kWarpSize) {
      out[j] = token.is_routed(j) ? share : Acc(0);
    }
    return;
  }
  const auto weight = score_of(score_function, normalize, token);
  for (int64_t j = lane_id(); j < token.top_k; j += kWarpSize) {
    out[j] = token.is_routed(j) ? weight(token.logit(token.indices[j])) : Acc(0);
  }
}

/// w = q / sum q, q being exp(logit) or the sigmoid, the sum running over the routed slots for
/// "topk" and over all experts for the softmax of "none", whose sigmoid is not divided:
///
///     dL/dlogit_i = w_i * dlog q_i/dlogit_i * (sum of g_j over slots with i_j = i  -  n_i <w, g>)
///
/// where n_i is how often q_i occurs in that sum. A lane looks through the slots for its experts,
/// so that each gradient has one writer and sums its slots in their order.
template <typename T>
__global__ void __launch_bounds__(kTokenThreads)
    gate_weights_backward_kernel(GateSizes sizes,
                                 ScoreFunction score_function,
                                 Normalize normalize,
                                 const at::opmath_type<T>* grad,
                                 const T* logits,
                                 const int64_t* indices,
                                 T* grad_logits) {
  using Acc = at::opmath_type<T>;
  const int64_t number = warp_in_grid();
  if (number >= sizes.num_tokens) {
    return;
  }
  const auto token = token_at(sizes, number, logits, indices);
  const Acc* g = grad + number * sizes.top_k;
  T* out = grad_logits + number * sizes.num_experts;
  // All that a token without a routed slot gets, whatever its logits are.
  if (token.num_routed() == 0 || normalize == Normalize::uniform) {
    for (int64_t e = lane_id(); e < token.num_experts; e += kWarpSize) {
      out[e] = T(0);
    }
    return;
  }
  const auto weight = score_of(score_function, normalize, token);
  const bool over_slots = normalize == Normalize::topk;
  const bool over_experts = !over_slots && score_function == ScoreFunction::softmax;
  Acc mean = 0;
  if (over_slots || over_experts) {
    mean = sum_of<Acc>(token.top_k, [&](int64_t j) {
      return token.is_routed(j) ? weight(token.logit(token.indices[j])) * g[j] : Acc(0);
    });
  }
  for (int64_t e = lane_id(); e < token.num_experts; e += kWarpSize) {
    Acc sum = over_experts ? -mean : Acc(0);
    bool chosen = false;
    for (int64_t j = 0; j < token.top_k; ++j) {
      if (token.indices[j] == e) {
        sum += over_slots ? g[j] - mean : g[j];
        chosen = true;
      }
    }
    // The logit of an expert that is not summed over may be anything.
    const bool counts = chosen || !over_slots;
    const Acc logit = token.logit(e);
    out[e] = static_cast<T>(counts ? weight(logit) * sum * weight.slope(logit) : Acc(0));
  }
}

}  // namespace

template <typename T>
void gate_weights(Stream stream,
                  const GateSizes& sizes,
                  ScoreFunction score_function,
                  Normalize normalize,
                  const T* logits,
                  const int64_t* indices,
                  at::opmath_type<T>* weights) {
  launch(stream,
         blocks_of_tokens(sizes.num_tokens),
         kTokenThreads,
         0,
         gate_weights_kernel<T>,
         sizes,
         score_function,
         normalize,
         logits,
         indices,
         weights);
}

template <typename T>
void gate_weights_backward(Stream stream,
                           const GateSizes& sizes,
                           ScoreFunction score_function,
                           Normalize normalize,
                           const at::opmath_type<T>* grad,
                           const T* logits,
                           const int64_t* indices,
                           T* grad_logits) {
  launch(stream,
         blocks_of_tokens(sizes.num_tokens),
         kTokenThreads,
         0,
         gate_weights_backward_kernel<T>,
         sizes,
         score_function,
         normalize,
         grad,
         logits,
         indices,
         grad_logits);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...)                             \
  template void gate_weights(Stream,                             \
                             const GateSizes&,                   \
                             ScoreFunction,                      \
                             Normalize,                          \
                             const T*,                           \
                             const int64_t*,                     \
                             at::opmath_type<T>*);               \
  template void gate_weights_backward(Stream,                    \
                                      const GateSizes&,          \
                                      ScoreFunction,             \
                                      Normalize,                 \
                                      const at::opmath_type<T>*, \
                                      const T*,                  \
                                      const int64_t*,            \
                                      T*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda

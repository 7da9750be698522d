#include "cuda/select_experts_kernel.h"

#include "common/float_types.h"
#include "cuda/candidate.h"
#include "cuda/score.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

namespace {

/// The first of this lane's experts (lane, lane + 32, ...) that comes after `taken`.
template <typename T>
__device__ Candidate<at::opmath_type<T>> next_of_lane(const SelectScores<T>& scores,
                                                      int64_t token,
                                                      int64_t num_experts,
                                                      const Candidate<at::opmath_type<T>>& taken) {
  using Acc = at::opmath_type<T>;
  auto first = Candidate<Acc>::none();
  for (int64_t e = lane_id(); e < num_experts; e += kWarpSize) {
    const int64_t i = token * num_experts + e;
    const auto score = static_cast<Acc>(scores.scores[i]);
    const Candidate<Acc> candidate{{scores.bias == nullptr ? score : score + scores.bias[e],
                                    scores.tie_break == nullptr ? Acc(0) : scores.tie_break[i]},
                                   e};
    if (comes_before(candidate, first) && comes_before(taken, candidate)) {
      first = candidate;
    }
  }
  return first;
}

/// A warp selects one token's experts, a round each. A lane remembers no more than the next of its
/// own experts, and looks through them again when that one has been taken: registers for any number
/// of experts and choices.
template <typename T>
__global__ void __launch_bounds__(kTokenThreads) select_experts_kernel(SelectSizes sizes,
                                                                       SelectScores<T> scores,
                                                                       const bool* token_mask,
                                                                       int64_t* indices) {
  using Acc = at::opmath_type<T>;
  const int64_t token = warp_in_grid();
  if (token >= sizes.num_tokens) {
    return;
  }
  int64_t* out = indices + token * sizes.top_k;
  if (token_mask != nullptr && !token_mask[token]) {
    for (int64_t j = lane_id(); j < sizes.top_k; j += kWarpSize) {
      out[j] = -1;
    }
    return;
  }
  auto mine = next_of_lane(scores, token, sizes.num_experts, Candidate<Acc>::start());
  for (int64_t j = 0; j < sizes.top_k; ++j) {
    const auto best = first_of_warp(mine);
    if (mine.expert == best.expert) {
      out[j] = best.expert;
      if (j + 1 < sizes.top_k) {
        mine = next_of_lane(scores, token, sizes.num_experts, best);
      }
    }
  }
}

}  // namespace

template <typename T>
void select_experts(Stream stream,
                    const SelectSizes& sizes,
                    const SelectScores<T>& scores,
                    const bool* token_mask,
                    int64_t* indices) {
  launch(stream,
         blocks_of_tokens(sizes.num_tokens),
         kTokenThreads,
         0,
         select_experts_kernel<T>,
         sizes,
         scores,
         token_mask,
         indices);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...) \
  template void select_experts(      \
      Stream, const SelectSizes&, const SelectScores<T>&, const bool*, int64_t*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda

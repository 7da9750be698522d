#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/rank.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "ops/select_experts.h"

namespace torchmoe {

namespace {

/// The top_k of one token's scores, best first, by insertion into a sorted list: linear in the
/// number of experts for the small top_k of routing, since most scores fail the first comparison.
/// Equal scores rank by expert id, which the ascending scan with a strict comparison gives for
/// free. score_of(e) is a scalar, or a Ranked.
template <typename Score, typename ScoreOf>
void select_row(
    const ScoreOf& score_of, int64_t num_experts, int64_t top_k, Score* best, int64_t* indices) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const Score score = score_of(e);
    if (count == top_k && !ranks_before(score, best[top_k - 1])) {
      continue;
    }
    int64_t place = count < top_k ? count++ : top_k - 1;
    for (; place > 0 && ranks_before(score, best[place - 1]); --place) {
      best[place] = best[place - 1];
      indices[place] = indices[place - 1];
    }
    best[place] = score;
    indices[place] = e;
  }
}

/// score_of(token, expert) is a Score.
template <typename Score, typename ScoreOf>
void select_tokens(const ScoreOf& score_of,
                   const bool* token_mask,
                   int64_t num_tokens,
                   int64_t num_experts,
                   int64_t top_k,
                   int64_t* indices) {
  cpu::parallel_items(num_tokens, num_experts, [&](int64_t begin, int64_t end) {
    std::vector<Score> best(top_k);
    for (int64_t t = begin; t < end; ++t) {
      if (token_mask != nullptr && !token_mask[t]) {
        std::fill(indices + t * top_k, indices + (t + 1) * top_k, -1);
      } else {
        select_row([&](int64_t e) { return score_of(t, e); },
                   num_experts,
                   top_k,
                   best.data(),
                   indices + t * top_k);
      }
    }
  });
}

template <typename T>
void select_experts_kernel_impl(const T* scores,
                                const T* bias,
                                const T* tie_break,
                                const bool* token_mask,
                                int64_t num_tokens,
                                int64_t num_experts,
                                int64_t top_k,
                                int64_t* indices) {
  const auto score = [=](int64_t t, int64_t e) {
    const T unbiased = scores[t * num_experts + e];
    return bias == nullptr ? unbiased : unbiased + bias[e];
  };
  if (tie_break == nullptr) {
    select_tokens<T>(score, token_mask, num_tokens, num_experts, top_k, indices);
    return;
  }
  const auto ranked = [=](int64_t t, int64_t e) {
    return Ranked<T>{score(t, e), tie_break[t * num_experts + e]};
  };
  select_tokens<Ranked<T>>(ranked, token_mask, num_tokens, num_experts, top_k, indices);
}

at::Tensor select_experts_kernel(const at::Tensor& scores,
                                 int64_t top_k,
                                 const std::optional<at::Tensor>& selection_bias,
                                 const std::optional<at::Tensor>& token_mask,
                                 const std::optional<at::Tensor>& tie_break) {
  check_select_experts(scores, top_k, selection_bias, token_mask, tie_break);
  const auto acc = accumulate_dtype(scores.scalar_type());
  const auto scores_acc = contiguous_as(scores, acc);
  const auto bias_acc = contiguous_as(selection_bias, acc);
  const auto tie_break_acc = contiguous_as(tie_break, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  auto indices = at::empty({scores.size(0), top_k}, scores.options().dtype(at::kLong));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    select_experts_kernel_impl(scores_acc.const_data_ptr<scalar_t>(),
                               data_or_null<scalar_t>(bias_acc),
                               data_or_null<scalar_t>(tie_break_acc),
                               data_or_null<bool>(mask),
                               scores.size(0),
                               scores.size(1),
                               top_k,
                               indices.mutable_data_ptr<int64_t>());
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("select_experts", &select_experts_kernel);
}

}  // namespace torchmoe

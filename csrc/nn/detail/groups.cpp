#include "nn/detail/groups.h"

#include <algorithm>
#include <limits>
#include <optional>

#include <ATen/ops/logsumexp.h>

#include "nn/detail/by_expert.h"
#include "ops/select_experts.h"

namespace torchmoe::nn {
namespace {

constexpr int64_t kBestOfGroup = 2;  // how many experts' scores make up a group's

}  // namespace

at::Tensor limit_to_groups(const at::Tensor& scores,
                           const at::Tensor& logits,
                           int64_t num_groups,
                           int64_t top_groups) {
  const int64_t num_tokens = scores.size(0);
  const int64_t size = scores.size(1) / num_groups;
  // A row for each group of each token.
  const auto of_group = scores.reshape({num_tokens * num_groups, size});
  const auto logits_of_group = logits.reshape({num_tokens * num_groups, size});
  const auto best = select_experts(
      of_group, std::min(kBestOfGroup, size), std::nullopt, std::nullopt, logits_of_group);
  const auto groups =
      select_experts(of_group.gather(1, best).sum(1).view({num_tokens, num_groups}),
                     top_groups,
                     std::nullopt,
                     std::nullopt,
                     logits_of_group.gather(1, best).logsumexp(1).view({num_tokens, num_groups}));
  const auto kept = named(groups, num_groups).unsqueeze(-1).expand({num_tokens, num_groups, size});
  return scores.masked_fill(kept.reshape(scores.sizes()).logical_not(),
                            -std::numeric_limits<double>::infinity());
}

}  // namespace torchmoe::nn

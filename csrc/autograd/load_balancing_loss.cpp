#include "ops/load_balancing_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/any.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "autograd/composed.h"
#include "autograd/shares.h"
#include "common/dtypes.h"
#include "ops/mean_over_tokens.h"

namespace torchmoe {

namespace {

at::Tensor compose_load_balancing_loss(const at::Tensor& logits,
                                       const at::Tensor& fraction,
                                       std::string_view score_function,
                                       const std::optional<at::Tensor>& token_mask) {
  const auto dtype = accumulate_dtype(logits.scalar_type());
  const auto wide = logits.to(dtype);
  const auto counted = token_mask ? at::where(token_mask->unsqueeze(-1), wide, 0.0) : wide;
  const auto score = choose<ScoreFunction>("load_balancing_loss", score_function);
  const auto shares = mean_over_tokens(shares_of(counted, score), token_mask);
  const auto products = fraction.detach().to(dtype) * shares;
  const auto losses = at::sum(products, -1) * logits.sym_size(-1);  // 0 where nothing is counted
  if (!token_mask) {
    return at::sum(losses) / std::max<c10::SymInt>(losses.sym_numel(), 1);
  }
  const auto groups = at::sum(at::any(*token_mask, -1).to(dtype));
  return at::sum(losses) / groups.clamp_min(1);
}

struct LoadBalancingLoss {
  static constexpr auto kName = "load_balancing_loss";
  static constexpr auto out = &load_balancing_loss;
  static constexpr auto gradient = &load_balancing_loss_backward;
  static constexpr auto check = &check_load_balancing_loss;
  static constexpr auto check_gradient = &check_load_balancing_loss_backward;
  static constexpr auto composition = &compose_load_balancing_loss;
};

using LoadBalancingLossDerivatives = Composed<LoadBalancingLoss,
                                              const at::Tensor&,
                                              std::string_view,
                                              const std::optional<at::Tensor>&>;

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("load_balancing_loss", &LoadBalancingLossDerivatives::out);
  m.impl("_load_balancing_loss_backward", &LoadBalancingLossDerivatives::gradient);
}

}  // namespace torchmoe

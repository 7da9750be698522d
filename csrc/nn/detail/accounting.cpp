#include "nn/detail/accounting.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/ones_like.h>
#include <c10/util/accumulate.h>

#include "common/vocabulary.h"
#include "nn/detail/by_expert.h"
#include "nn/detail/checks.h"
#include "nn/detail/compatibility.h"
#include "ops/load_balancing_loss.h"
#include "ops/router_z_loss.h"

namespace torchmoe::nn {
namespace {

/// Counts of all processes, and this one's part in a mean over the tokens of all: with n_r tokens
/// here, n in all and W processes n_r W / n, which is exactly 1 where they are equal, and 0 without
/// a token.
std::pair<at::Tensor, at::Tensor> counts_and_part(const MoEImpl& layer,
                                                  const at::Tensor& counts,
                                                  const std::optional<at::Tensor>& counted,
                                                  int64_t num_tokens,
                                                  at::ScalarType dtype) {
  const auto one = counts.new_ones({1});
  const auto tokens = counted ? one * *counted : one * num_tokens;
  // One reduction: whatever is reduced apart is waited for apart.
  const auto summed = over_processes(layer, at::cat({counts, tokens, at::ones_like(tokens)}));
  const auto in_all = summed.select(0, -2);
  const auto processes = summed.select(0, -1);
  const auto part = (tokens[0] * processes).to(dtype) / in_all.clamp_min(1).to(dtype);
  return {summed.narrow(0, 0, counts.size(0)), part};
}

void check_earlier(const Balance& balance,
                   FractionFrom from,
                   const at::Tensor& earlier_counts,
                   const at::Tensor& counts) {
  TORCH_CHECK_VALUE(from == FractionFrom::batch || from == FractionFrom::global_batch,
                    "MoE: earlier_counts must be None with fraction_from \"",
                    balance.fraction_from(),
                    "\", got a tensor of ",
                    earlier_counts.scalar_type(),
                    " of shape ",
                    earlier_counts.sizes());
  check_counts("MoE",
               "earlier_counts",
               earlier_counts,
               counts.size(0),
               counts.device(),
               /*whole=*/true);
}

at::Tensor load_balancing_loss_of(const MoEImpl& layer,
                                  const LossInputs& inputs,
                                  const Choice& choice,
                                  const at::Tensor& tokens_per_expert,
                                  const std::optional<at::Tensor>& counted,
                                  at::IntArrayRef leading,
                                  const std::optional<at::Tensor>& earlier_counts) {
  const auto& balance = layer.options().balance();
  const auto from = choose<FractionFrom>("Balance", balance.fraction_from());
  auto logits = inputs.logits;
  auto mask = inputs.token_mask;
  auto choices = choice.chosen;
  auto counts = tokens_per_expert;
  at::Tensor part;
  if (choose<FractionChoices>("Balance", balance.fraction_choices()) == FractionChoices::first) {
    choices = choices.narrow(1, 0, 1);
    counts = count(choices.flatten(), inputs.num_experts);
  }
  if (earlier_counts) {
    check_earlier(balance, from, *earlier_counts, counts);
    counts = counts + *earlier_counts;
  }
  if (from == FractionFrom::history) {
    counts = usage_of(layer.router());
  } else if (from == FractionFrom::global_batch && layer.is_training()) {
    std::tie(counts, part) =
        counts_and_part(layer, counts, counted, logits.size(0), wide_type(logits.scalar_type()));
  } else if (from == FractionFrom::sequence) {
    const int64_t length = leading.empty() ? 1 : leading.back();
    const int64_t sequences =
        leading.empty() ? 1 : c10::multiply_integers(leading.begin(), leading.end() - 1);
    logits = logits.view({sequences, length, inputs.num_experts});
    if (mask) {
      mask = mask->view({sequences, length});
    }
    counts = count(choices.reshape({sequences, length * choices.size(1)}), inputs.num_experts);
  }
  const auto loss = load_balancing_loss(
      logits, shares(counts, logits.scalar_type()), inputs.score_function, mask);
  return part.defined() ? part * loss : loss;
}

}  // namespace

at::Tensor over_processes(const MoEImpl& layer, const at::Tensor& counts) {
  auto summed = counts.detach().clone();
  if (const auto& all_reduce = layer.options().all_reduce()) {
    summed = all_reduce(summed);
    TORCH_CHECK(
        summed.defined() && summed.sizes() == counts.sizes() &&
            summed.scalar_type() == counts.scalar_type(),
        "MoE: all_reduce must return a sum of shape ",
        counts.sizes(),
        " and type ",
        counts.scalar_type(),
        ", got ",
        summed.defined() ? c10::str(summed.scalar_type(), " of shape ", summed.sizes()) : "None");
  }
  return summed;
}

Account account(const MoEImpl& layer,
                const RouterOutput& routed,
                const Choice& choice,
                const at::Tensor& weights,
                const std::optional<at::Tensor>& token_mask,
                const std::optional<at::Tensor>& counted,
                at::IntArrayRef leading,
                const std::optional<at::Tensor>& earlier_counts) {
  const auto& options = layer.options();
  const auto& balance = options.balance();
  const LossInputs inputs{
      .logits = routed.logits,
      .weights = weights,
      .indices = choice.weighed,
      .token_mask = token_mask,
      .score_function = layer.estimator().score_function(),
      .num_experts = options.num_experts(),
      .top_k = options.top_k(),
      .clean_logits = routed.clean_logits.value_or(routed.logits),
      .noise_deviation = routed.noise_deviation,
  };
  Account result;
  result.tokens_per_expert = count(choice.chosen.flatten(), options.num_experts());
  result.kept_per_expert = choice.is_kept ? result.tokens_per_expert
                                          : count(choice.indices.flatten(), options.num_experts());
  const auto load_balancing = load_balancing_loss_of(
      layer, inputs, choice, result.tokens_per_expert, counted, leading, earlier_counts);
  result.losses["load_balancing_loss"] = load_balancing;
  result.aux_loss = balance.weight() * load_balancing;
  const auto add = [&](const std::string& name, const at::Tensor& loss, double weight) {
    result.aux_loss = result.aux_loss + weight * loss;
    result.losses[name] = loss;
  };
  if (balance.z_loss_weight() > 0) {
    add("router_z_loss", router_z_loss(inputs.logits, token_mask), balance.z_loss_weight());
  }
  for (const auto& term : balance.losses()) {
    const auto loss = term.function(inputs);
    check_output("the term \"" + term.name + "\" of balance.losses",
                 loss,
                 {},
                 "a scalar",
                 inputs.logits.device());
    add(term.name, loss, term.weight);
  }
  return result;
}

}  // namespace torchmoe::nn

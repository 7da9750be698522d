// Slow and obvious: every op as its formula reads, in float64, with plain loops and no library
// product. Nothing outside the tests uses these.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "ops/dispatch_plan.h"

namespace torchmoe::reference {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The activations that this room has formulas for.
std::vector<std::string> activations();
bool is_gated(const std::string& activation);

Tensor router_logits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = {});

Tensor select_experts(const Tensor& scores,
                      int64_t top_k,
                      const OptionalTensor& selection_bias = {},
                      const OptionalTensor& token_mask = {});

Tensor limit_capacity(const Tensor& indices,
                      const std::vector<int64_t>& capacity,
                      const std::string& order,
                      const OptionalTensor& priority = {},
                      const std::string& overflow = "drop",
                      const OptionalTensor& scores = {},
                      const std::vector<int64_t>& backup = {});

// score_function(logits) over all experts.
Tensor probabilities(const Tensor& logits, const std::string& score_function);

Tensor gate_weights(const Tensor& logits,
                    const Tensor& indices,
                    const std::string& score_function,
                    const std::string& normalize);

// J_score^T dL/dp with dL/dp_i the sum of the gradients of the slots that chose i.
Tensor straight_through_gradient(const Tensor& grad,
                                 const Tensor& logits,
                                 const Tensor& indices,
                                 const std::string& score_function);

DispatchPlan dispatch_plan(const Tensor& indices, int64_t num_experts);

Tensor permute(const Tensor& x, const DispatchPlan& plan);

Tensor unpermute(const Tensor& rows, const Tensor& weights, const DispatchPlan& plan);

Tensor grouped_linear(const Tensor& rows,
                      const Tensor& weight,
                      const OptionalTensor& bias,
                      const Tensor& expert_offsets);

Tensor sum_by_expert(const Tensor& rows, const Tensor& expert_offsets);

Tensor expert_mlp(const Tensor& x,
                  const Tensor& indices,
                  const Tensor& weights,
                  const Tensor& w_in,
                  const OptionalTensor& b_in,
                  const Tensor& w_out,
                  const OptionalTensor& b_out,
                  const std::string& activation);

// logits [T, E]; fraction [E].
double load_balancing_loss(const Tensor& logits,
                           const Tensor& fraction,
                           const std::string& score_function,
                           const OptionalTensor& token_mask = {});

// values [T, C] -> [C].
Tensor mean_over_tokens(const Tensor& values, const OptionalTensor& token_mask = {});

double router_z_loss(const Tensor& logits, const OptionalTensor& token_mask = {});

}  // namespace torchmoe::reference

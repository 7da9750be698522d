// What a layer is built from. Names and defaults are those of the Python layer, which also has
// usage and what reads it, priorities, groups, further losses, shared experts, replaceable parts and
// estimators of one's own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/arg.h>

namespace torchmoe::nn {

/// How the weights of the chosen experts are formed from the logits.
struct GateOptions {
  /// "softmax" or "sigmoid".
  TORCH_ARG(std::string, score_function) = "softmax";
  /// "none", "topk" or "uniform"; nullopt is "topk" for top_k > 1, else "none".
  TORCH_ARG(std::optional<std::string>, normalize) = std::nullopt;
  /// "exact" or "straight_through".
  TORCH_ARG(std::string, estimator) = "exact";
};

/// How many slots an expert keeps, and which.
struct CapacityOptions {
  /* implicit */ CapacityOptions(double factor) : factor_(factor) {}

  /// Multiple of the share top_k * num_tokens / num_experts, taken as the decimal number written
  /// here.
  TORCH_ARG(double, factor);
  /// The factor in evaluation mode; nullopt uses `factor`.
  TORCH_ARG(std::optional<double>, eval_factor) = std::nullopt;
  /// An expert keeps at least this many (or every token, if there are fewer).
  TORCH_ARG(int64_t, minimum) = 0;
  /// "choice": all first choices in token order, then all second ones; "token": token by token.
  TORCH_ARG(std::string, order) = "choice";
  /// What becomes of a slot that finds its expert full: "drop", "next_best" or "backup", see
  /// limit_capacity.
  TORCH_ARG(std::string, overflow) = "drop";
  /// With "backup": for each expert another one.
  TORCH_ARG(std::vector<int64_t>, backup) = {};
  /// "before_drop" or "after_drop": whether dropped slots count where weights are normalised.
  TORCH_ARG(std::string, normalize) = "before_drop";
};

struct RouterOptions {
  RouterOptions(int64_t hidden_size, int64_t num_experts)
      : hidden_size_(hidden_size), num_experts_(num_experts) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(bool, bias) = false;
  /// In training the router sees x * u with u uniform in [1 - input_jitter, 1 + input_jitter]; the
  /// experts see x.
  TORCH_ARG(double, input_jitter) = 0.0;
  /// In training a normal draw of this standard deviation is added to the logits, which so rank,
  /// weigh and enter the losses.
  TORCH_ARG(double, logit_noise) = 0.0;
};

struct ExpertsOptions {
  ExpertsOptions(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : hidden_size_(hidden_size),
        intermediate_size_(intermediate_size),
        num_experts_(num_experts) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  TORCH_ARG(int64_t, num_experts);
  /// A word of TORCHMOE_ACTIVATIONS (common/activation_names.h).
  TORCH_ARG(std::string, activation) = "swiglu";
  TORCH_ARG(bool, bias) = false;
};

struct MoEOptions {
  MoEOptions(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts, int64_t top_k)
      : hidden_size_(hidden_size),
        intermediate_size_(intermediate_size),
        num_experts_(num_experts),
        top_k_(top_k) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k);
  TORCH_ARG(std::string, activation) = "swiglu";
  /// Of the experts only; the router's is RouterOptions::bias.
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(GateOptions, gate);
  /// nullopt keeps every slot.
  TORCH_ARG(std::optional<CapacityOptions>, capacity) = std::nullopt;
  TORCH_ARG(double, balance_weight) = 0.01;
  /// At 0 the router z-loss is not computed.
  TORCH_ARG(double, z_loss_weight) = 0.0;
  /// nullopt is RouterOptions(hidden_size, num_experts).
  TORCH_ARG(std::optional<RouterOptions>, router) = std::nullopt;
};

}  // namespace torchmoe::nn

// How many slots an expert keeps, and what happens to the rest.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

namespace torchmoe::nn {

/// Limits the slots of an expert to ceil(factor * top_k * num_tokens / num_experts), in the
/// integers of `expert_capacity`. For example:
///
///     Capacity(1.25)                                       all first choices, then all second ones
///     Capacity(1.25).order("token")                        token by token
///     Capacity(1.25).priority("random")                    random dropping
///     Capacity(1.25).priority("weight")                    the smallest weights are dropped
///     Capacity(1).overflow("next_best")                    no slot is dropped while there is room
///     Capacity(1).overflow("backup").backup({1, 2, 0})     expert i's overflow goes to backup[i]
///     Capacity(1).dynamic(true)                            more room where the load has been high
///
/// The layer checks the settings (c10::ValueError): values out of range, unknown words, and
/// settings that are not compatible.
struct Capacity {
  /* implicit */ Capacity(double factor) : factor_(factor) {}

  /// Capacity factor in training; 1 is just enough room when tokens spread evenly. Taken as the
  /// nearest fraction with a denominator of at most 10^6, so 1.1 is 11/10.
  TORCH_ARG(double, factor);
  /// The factor in evaluation mode; nullopt uses `factor`.
  TORCH_ARG(std::optional<double>, eval_factor) = std::nullopt;
  /// An expert keeps at least this many slots (or every token, if there are fewer).
  TORCH_ARG(int64_t, minimum) = 0;
  /// Who is served first: "choice" (all first choices in token order, then all second ones: a later
  /// token can displace an earlier one's second choice) or "token" (token by token: causal).
  TORCH_ARG(std::string, order) = "choice";
  /// What happens to a slot whose expert is full: "drop", "next_best" or "backup", see
  /// `limit_capacity`. A rerouted slot has the weight of its new expert.
  TORCH_ARG(std::string, overflow) = "drop";
  /// "before_drop": weights are formed before slots are dropped, so a token that loses a slot keeps
  /// the weights of its other slots, and its router a gradient. "after_drop": weights are formed
  /// over the remaining slots.
  TORCH_ARG(std::string, normalize) = "before_drop";
  /// nullopt: as `order` says. "random": in training by a random draw for every slot, from torch's
  /// default generator. "weight": larger combine weights first (V-MoE, arXiv 2106.05974).
  TORCH_ARG(std::optional<std::string>, priority) = std::nullopt;
  /// With overflow "backup": another expert for each expert; else empty.
  TORCH_ARG(std::vector<int64_t>, backup) = {};
  /// "up", or "down" for the floor of the formula.
  TORCH_ARG(std::string, rounding) = "up";
  /// Each expert's capacity is that of `dynamic_capacity` with the router's `usage`.
  TORCH_ARG(bool, dynamic) = false;

 public:
  /// Throws unless every setting is valid and they are compatible.
  void check() const;

  /// Whether a slot whose expert is full may get another expert.
  bool reroutes() const;
  /// Whether weights are formed over the remaining slots, for this normalisation of the gate.
  bool renormalizes(std::string_view gate_normalize) const;

  /// The most slots that each expert keeps: [E] int64.
  ///
  /// The device is that of `like`; num_tokens is how many tokens count, an int or integer scalar;
  /// usage [E] is for a dynamic capacity.
  at::Tensor slots(const at::Tensor& like,
                   int64_t num_tokens,
                   int64_t num_experts,
                   int64_t top_k,
                   bool training,
                   const at::Tensor& usage = {}) const;
  at::Tensor slots(const at::Tensor& like,
                   const at::Tensor& num_tokens,
                   int64_t num_experts,
                   int64_t top_k,
                   bool training,
                   const at::Tensor& usage = {}) const;
};

/// In the form that Python prints: the fields that differ from the defaults.
std::ostream& operator<<(std::ostream& stream, const Capacity& capacity);

}  // namespace torchmoe::nn

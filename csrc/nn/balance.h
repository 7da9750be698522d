// How a layer keeps its experts' loads even: the terms of aux_loss, and the rate of the bias.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

namespace torchmoe::nn {

/// What a layer gives to each of its loss terms; T counts the flattened tokens.
struct LossInputs {
  at::Tensor logits;                      ///< [T, E], float32 or wider, with their gradient
  at::Tensor weights;                     ///< [T, K], with theirs; K + 1 columns with assistance
  at::Tensor indices;                     ///< [T, K] int64, the expert of each weight, or -1
  std::optional<at::Tensor> token_mask;   ///< [T] bool, true = the token counts
  std::string score_function;             ///< the gate's
  int64_t num_experts;                    ///< E
  int64_t top_k;                          ///< K
  at::Tensor clean_logits;                ///< [T, E], the logits before the router added noise
  std::optional<double> noise_deviation;  ///< of that noise, above 0; nullopt where none was added
};

/// A further term of aux_loss.
struct LossTerm {
  std::string name;                                              ///< its key in Routing::losses
  std::function<at::Tensor(const LossInputs& inputs)> function;  ///< -> a scalar, unweighted
  double weight;                                                 ///< a finite number >= 0
};

/// The weighted terms of aux_loss, and the selection bias. For example:
///
///     Balance(0.001)                                            a weaker load-balancing loss
///     Balance(0)                                                none
///     Balance().z_loss_weight(0.001)                            and a router z-loss (ST-MoE)
///     Balance(0).selection_bias_rate(0.001)                     balance without a loss
///     Balance().fraction_from("history")                        the same for any micro-batches
///     Balance().losses({{"mean_logit", mean_logit, 0.01}})      a further term, a function
///
/// The layer checks the settings (c10::ValueError).
struct Balance {
  /* implicit */ Balance(double weight = 0.01) : weight_(weight) {}

  /// Coefficient of load_balancing_loss in aux_loss.
  TORCH_ARG(double, weight);
  /// Coefficient of router_z_loss in aux_loss; at 0 it is not computed.
  TORCH_ARG(double, z_loss_weight) = 0.0;
  /// Further terms of aux_loss.
  TORCH_ARG(std::vector<LossTerm>, losses) = {};
  /// Where the fractions of load_balancing_loss (each expert's share of the slots) come from.
  /// "batch": the tokens of this call. "sequence": each sequence alone, and the losses are averaged
  /// (the last leading dimension of x is the sequence; DeepSeek-V3, arXiv 2412.19437, equation 17).
  /// "global_batch": the calls of all processes (Qiu et al., arXiv 2501.11873). In training mode
  /// forward sums them with MoEOptions::all_reduce, which every process must reach. With n_r
  /// counted tokens in this process, n in total and W processes, the process's term is multiplied
  /// by n_r W / n, so that the mean over the processes is that of one batch. "history": the
  /// router's `usage`. With "history", and with "sequence" for equal numbers of sequences,
  /// accumulating the gradients of micro-batches gives exactly the gradient of one batch; for the
  /// others see earlier_counts of `MoEImpl::forward`.
  TORCH_ARG(std::string, fraction_from) = "batch";
  /// "all": all choices of a token count in the fractions; "first": only the first (GShard, arXiv
  /// 2006.16668). "history" counts all choices.
  TORCH_ARG(std::string, fraction_choices) = "all";
  /// If above 0, the layer has a selection bias that `MoEImpl::update` moves by this much against
  /// the load, see `update_selection_bias`.
  TORCH_ARG(double, selection_bias_rate) = 0.0;
  /// Keeps the mean of the selection bias constant.
  TORCH_ARG(bool, selection_bias_centred) = false;

 public:
  /// Throws unless every setting is valid and they are compatible.
  void check() const;
};

/// In the form that Python prints: the fields that differ from the defaults.
std::ostream& operator<<(std::ostream& stream, const Balance& balance);

}  // namespace torchmoe::nn

// Help for experts whose load has been high for long.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/pimpl.h>

#include "remembering.h"

namespace torchmoe::nn {

/// A backup that joins an expert under sustained load, in a slot of its own beside the top_k.
///
///     usage_i > threshold / E for `patience` updates in a row   backup[i] begins to assist i
///     usage_i < lower_threshold / E                             it stops
///
/// While expert i is assisted, each token routed to i gets one more slot, with backup[i]: weighed
/// like any other and served by capacity like any other, as its last choice. Where several of a
/// token's choices are assisted the best of them decides whose backup it is; where the token has
/// that expert already, the slot stays empty. There are always top_k + 1 columns.
///
/// The state changes in `MoEImpl::update` only, from the router's `usage`, the running share of the
/// router's own choices. The layer that takes it checks it (c10::ValueError).
struct Assistance {
  /* implicit */ Assistance(std::vector<int64_t> backup) : backup_(std::move(backup)) {}

  /// For each expert another one.
  TORCH_ARG(std::vector<int64_t>, backup);
  /// In multiples of the even share 1 / E; below E / K, the load of an expert that every token
  /// chooses. nullopt is 2, or halfway between 1 and E / K where that is at most 2.
  TORCH_ARG(std::optional<double>, threshold) = std::nullopt;
  /// The same; at most `threshold`. The gap keeps assistance from flickering. nullopt is 1.5, or
  /// halfway between 1 and threshold where that is nullopt or below 1.5.
  TORCH_ARG(std::optional<double>, lower_threshold) = std::nullopt;
  /// Updates in a row.
  TORCH_ARG(int64_t, patience) = 100;

 public:
  /// Throws unless every setting is one, and they go together.
  void check() const;
};

/// Who is assisted: the submodule `assistance` of a layer that was given an `Assistance`.
class AssistanceStateImpl : public Remembering<AssistanceStateImpl> {
 public:
  /// least_experts is how many experts every token has at least, from which thresholds that were
  /// left open follow. Throws c10::ValueError where a setting is out of range.
  AssistanceStateImpl(const Assistance& settings, int64_t least_experts);

  void reset() override;
  /// Nobody is assisted.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// selected [T, K] int64, best first, an id outside [0, E) is not routed -> [T, K + 1], the last
  /// column -1 where nobody assists.
  at::Tensor forward(const at::Tensor& selected);

  /// Begins and ends assistance; `MoEImpl::update` calls it once per optimizer step. usage [E],
  /// after its own update; num_slots an integer scalar, the slots of the step, where there is none
  /// nothing changes.
  void update(const at::Tensor& usage, const at::Tensor& num_slots);

  /// With the thresholds that were left open.
  const Assistance& settings() const { return settings_; }
  double threshold() const { return *settings_.threshold(); }
  double lower_threshold() const { return *settings_.lower_threshold(); }

  at::Tensor assisted;       ///< [E] buffer, 1 for the experts that are assisted, else 0
  at::Tensor updates_above;  ///< [E] buffer, updates in a row with usage above the threshold

 protected:
  void follow(at::Device device) override { table_ = table_.to(device); }

 private:
  at::Tensor is_assisted() const;

  Assistance settings_;
  at::Tensor table_;  // [E] int64, the backups where they are read
};
TORCH_MODULE(AssistanceState);

/// As Python shows it.
std::ostream& operator<<(std::ostream& stream, const Assistance& assistance);

}  // namespace torchmoe::nn

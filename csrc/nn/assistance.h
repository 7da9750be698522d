// Help for experts whose load has been high for a long time.
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

/// A backup for an expert under sustained load, in one extra slot in addition to the top_k.
///
///     usage_i > threshold / E for `patience` updates in a row   backup[i] begins to assist i
///     usage_i < lower_threshold / E                             it stops
///
/// While expert i is assisted, each token routed to i gets one extra slot, for backup[i]. This slot
/// is weighted and subject to capacity like any other, as the token's last choice. If several of a
/// token's choices are assisted, the backup of the best of them is used; if the token has chosen
/// that backup already, the slot stays empty. There are always top_k + 1 columns.
///
/// The state changes in `MoEImpl::update` only, from the router's `usage`, the running share of the
/// router's own choices. The layer checks the settings (c10::ValueError).
struct Assistance {
  /* implicit */ Assistance(std::vector<int64_t> backup) : backup_(std::move(backup)) {}

  /// Another expert for each expert.
  TORCH_ARG(std::vector<int64_t>, backup);
  /// In multiples of the even share 1 / E; below E / K, the load of an expert that every token
  /// chooses. nullopt is 2, or halfway between 1 and E / K if that is at most 2.
  TORCH_ARG(std::optional<double>, threshold) = std::nullopt;
  /// In the same unit; at most `threshold`. The gap prevents flickering. nullopt is 1.5, or halfway
  /// between 1 and threshold if that is nullopt or below 1.5.
  TORCH_ARG(std::optional<double>, lower_threshold) = std::nullopt;
  /// How many updates in a row usage must be above the threshold.
  TORCH_ARG(int64_t, patience) = 100;

 public:
  /// Throws unless every setting is valid and they are compatible.
  void check() const;
};

/// Which experts are assisted: the submodule `assistance` of a layer with an `Assistance`.
class AssistanceStateImpl : public Remembering<AssistanceStateImpl> {
 public:
  /// least_experts is the least number of experts that a token has; it determines thresholds that
  /// were not set. Throws c10::ValueError if a setting is out of range.
  AssistanceStateImpl(const Assistance& settings, int64_t least_experts);

  void reset() override;
  /// Resets the state: no expert is assisted.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// selected [T, K] int64, best first, an id outside [0, E) is not routed -> [T, K + 1], the last
  /// column -1 for tokens without an assisted choice.
  at::Tensor forward(const at::Tensor& selected);

  /// Begins and ends assistance; `MoEImpl::update` calls it once per optimizer step. usage [E] is
  /// already updated for this step; num_slots is an integer scalar, the slots of the step; if it is
  /// 0 nothing changes.
  void update(const at::Tensor& usage, const at::Tensor& num_slots);

  /// Including the thresholds that were not set.
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

/// In the form that Python prints.
std::ostream& operator<<(std::ostream& stream, const Assistance& assistance);

}  // namespace torchmoe::nn

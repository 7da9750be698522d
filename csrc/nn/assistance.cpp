#include "nn/assistance.h"

#include <algorithm>
#include <ostream>

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "nn/detail/checks.h"
#include "nn/detail/shown.h"

namespace torchmoe::nn {
namespace {

Assistance checked(const Assistance& settings) {
  settings.check();
  return settings;
}

/// The settings with the thresholds that were left open.
Assistance with_thresholds(Assistance settings, int64_t least_experts) {
  check_at_least("Assistance", "least_experts", least_experts, 1);
  const double most =
      static_cast<double>(settings.backup().size()) / static_cast<double>(least_experts);
  const auto given = settings.threshold();
  const double threshold = given.value_or(most > 2 ? 2.0 : (1 + most) / 2);
  double lower = 1.5;
  if (settings.lower_threshold()) {
    lower = *settings.lower_threshold();
  } else if (!given || threshold < 1.5) {
    lower = std::min((1 + threshold) / 2, threshold);
  }
  TORCH_CHECK_VALUE(lower > 0 && lower <= threshold,
                    "Assistance: lower_threshold must be in (0, threshold] = (0, ",
                    shown(threshold),
                    "], got ",
                    shown(lower));
  return settings.threshold(threshold).lower_threshold(lower);
}

}  // namespace

void Assistance::check() const {
  check_backup_table("Assistance", backup_);
  if (threshold_) {
    TORCH_CHECK_VALUE(*threshold_ > 0 && *threshold_ < static_cast<double>(backup_.size()),
                      "Assistance: threshold must be in (0, ",
                      backup_.size(),
                      "), up to the load of an expert that gets every slot, got ",
                      shown(*threshold_));
  }
  check_at_least("Assistance", "patience", patience_, 1);
  with_thresholds(*this, 1);
}

AssistanceStateImpl::AssistanceStateImpl(const Assistance& settings, int64_t least_experts)
    : settings_(with_thresholds(checked(settings), least_experts)),
      table_(at::tensor(settings.backup(), at::kLong)) {
  reset();
}

void AssistanceStateImpl::reset() {
  const auto size = static_cast<int64_t>(settings_.backup().size());
  assisted = register_wide_buffer("assisted", at::zeros({size}, at::kFloat));
  updates_above = register_wide_buffer("updates_above", at::zeros({size}, at::kFloat));
}

void AssistanceStateImpl::reset_parameters() {
  assisted.zero_();
  updates_above.zero_();
}

void AssistanceStateImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::" << settings_;
}

at::Tensor AssistanceStateImpl::forward(const at::Tensor& selected) {
  const auto num_experts = static_cast<int64_t>(settings_.backup().size());
  const auto routed = selected.ge(0).logical_and_(selected.lt(num_experts));
  const auto helped = is_assisted()
                          .index_select(0, at::where(routed, selected, 0).flatten())
                          .view(selected.sizes())
                          .logical_and_(routed);  // [T, K]
  // argmax gives the first of equal values, so the best choice.
  const auto best = helped.to(at::kByte).argmax(1, /*keepdim=*/true);  // [T, 1]
  const auto expert = selected.gather(1, best).clamp(0, num_experts - 1);
  const auto table = table_.to(selected.device());
  const auto helper = table.index_select(0, expert.flatten()).view(expert.sizes());  // [T, 1]
  const auto is_new = selected.ne(helper).all(1, /*keepdim=*/true);
  const auto joins = helped.any(1, /*keepdim=*/true).logical_and_(is_new);
  return at::cat({selected, at::where(joins, helper, -1)}, 1);
}

void AssistanceStateImpl::update(const at::Tensor& usage, const at::Tensor& num_slots) {
  const torch::NoGradGuard no_grad;
  const auto load = usage * static_cast<int64_t>(settings_.backup().size());
  const auto above = at::where(load.gt(threshold()), updates_above + 1, 0);
  const auto begins = above.ge(settings_.patience());
  const auto ends = load.lt(lower_threshold());
  const auto counts = num_slots.gt(0);
  const auto now = is_assisted().logical_or(begins).logical_and(ends.logical_not());
  updates_above.copy_(at::where(counts, above, updates_above));
  assisted.copy_(at::where(counts, now, assisted));
}

at::Tensor AssistanceStateImpl::is_assisted() const {
  return assisted.gt(0.5);  // [E]
}

std::ostream& operator<<(std::ostream& stream, const Assistance& assistance) {
  return Shown(stream, "Assistance")
      .show("backup", assistance.backup())
      .show("threshold", assistance.threshold())
      .show("lower_threshold", assistance.lower_threshold())
      .show("patience", assistance.patience())
      .end();
}

}  // namespace torchmoe::nn

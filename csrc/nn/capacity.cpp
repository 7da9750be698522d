#include "nn/capacity.h"

#include <ostream>

#include <ATen/TensorOperators.h>
#include <ATen/ops/minimum.h>

#include "common/checks.h"
#include "common/vocabulary.h"
#include "nn/detail/checks.h"
#include "nn/detail/shown.h"
#include "nn/expert_capacity.h"

namespace torchmoe::nn {
namespace {

CapacityFactor factor_of(const Capacity& capacity, bool training) {
  return training || !capacity.eval_factor()
             ? CapacityFactor(capacity.factor(), "Capacity", "factor")
             : CapacityFactor(*capacity.eval_factor(), "Capacity", "eval_factor");
}

/// For an int or a tensor.
template <typename NumTokens>
auto slots_of_each(const Capacity& capacity,
                   const NumTokens& num_tokens,
                   int64_t num_experts,
                   int64_t top_k,
                   bool training) {
  return expert_capacity(num_tokens,
                         num_experts,
                         top_k,
                         factor_of(capacity, training),
                         capacity.minimum(),
                         capacity.rounding());
}

}  // namespace

void Capacity::check() const {
  constexpr auto owner = "Capacity";
  check_at_least(owner, "minimum", minimum_, 0);
  choose<Rounding>(owner, rounding_);
  choose<CapacityOrder>(owner, order_);
  if (priority_) {
    choose<Priority>(owner, *priority_);
  }
  const bool wants_backup = choose<Overflow>(owner, overflow_) == Overflow::backup;
  choose<Normalized>(owner, normalize_);
  if (!backup_.empty()) {
    check_backup_table(owner, backup_);
  }
  TORCH_CHECK_VALUE(backup_.empty() != wants_backup,
                    "Capacity: backup must be ",
                    wants_backup ? "given" : "None",
                    " with overflow \"",
                    overflow_,
                    "\", got ",
                    backup_.empty() ? "None" : listed(backup_));
  TORCH_CHECK_VALUE(!dynamic_ || choose<Rounding>(owner, rounding_) == Rounding::up,
                    "Capacity: rounding must be \"up\" with dynamic=True, got \"",
                    rounding_,
                    "\"");
  factor_of(*this, /*training=*/true);
  factor_of(*this, /*training=*/false);
}

bool Capacity::reroutes() const {
  return choose<Overflow>("Capacity", overflow_) != Overflow::drop;
}

bool Capacity::renormalizes(std::string_view gate_normalize) const {
  return choose<Normalized>("Capacity", normalize_) == Normalized::after_drop &&
         choose<Normalize>("Gate", gate_normalize) != Normalize::none;
}

at::Tensor Capacity::slots(const at::Tensor& like,
                           int64_t num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           bool training,
                           const at::Tensor& usage) const {
  if (dynamic_) {
    check_defined("Capacity", "usage", usage);
    return dynamic_capacity(usage, num_tokens * top_k, factor_of(*this, training))
        .clamp_min(minimum_)
        .clamp_max(num_tokens);
  }
  return like.new_full({num_experts},
                       slots_of_each(*this, num_tokens, num_experts, top_k, training),
                       like.options().dtype(at::kLong));
}

at::Tensor Capacity::slots(const at::Tensor& like,
                           const at::Tensor& num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           bool training,
                           const at::Tensor& usage) const {
  if (dynamic_) {
    check_defined("Capacity", "usage", usage);
    return at::minimum(
        dynamic_capacity(usage, num_tokens * top_k, factor_of(*this, training)).clamp_min(minimum_),
        num_tokens);
  }
  return slots_of_each(*this, num_tokens, num_experts, top_k, training)
      .to(like.device())
      .expand({num_experts});
}

std::ostream& operator<<(std::ostream& stream, const Capacity& capacity) {
  const Capacity neutral(0);
  return Shown(stream, "Capacity")
      .show("factor", capacity.factor())
      .show("eval_factor", capacity.eval_factor(), neutral.eval_factor())
      .show("minimum", capacity.minimum(), neutral.minimum())
      .show("order", capacity.order(), neutral.order())
      .show("overflow", capacity.overflow(), neutral.overflow())
      .show("normalize", capacity.normalize(), neutral.normalize())
      .show("priority", capacity.priority(), neutral.priority())
      .show("backup", capacity.backup(), neutral.backup())
      .show("rounding", capacity.rounding(), neutral.rounding())
      .show("dynamic", capacity.dynamic(), neutral.dynamic())
      .end();
}

}  // namespace torchmoe::nn

#pragma once

#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

namespace torchmoe {

/// Where every slot goes when the slots are sorted by expert. Slot t*K + j is token t's j-th
/// choice; N = T*K.
struct DispatchPlan {
  /// [E + 1] int64: expert e's rows are expert_offsets[e] .. expert_offsets[e + 1].
  at::Tensor expert_offsets;
  /// [N] int64: the routed slots by expert, in slot order within one; then the unrouted ones.
  at::Tensor row_to_slot;
  /// [T, K] int64: the inverse.
  at::Tensor slot_to_row;

  auto fields() const { return std::tie(expert_offsets, row_to_slot, slot_to_row); }
};

/// The stable counting sort of the slots by expert: a full permutation, whatever the ids. An id
/// outside [0, E) is not routed; its row is at or after expert_offsets[E].
///
/// indices [T, K] int64, num_experts = E >= 0. Not differentiable.
DispatchPlan dispatch_plan(const at::Tensor& indices, c10::SymInt num_experts);

void check_dispatch_plan(const at::Tensor& indices, const c10::SymInt& num_experts);

/// Checks of offsets [E + 1] that an op takes without the rest of a plan.
void check_expert_offsets(std::string_view op,
                          const at::Tensor& expert_offsets,
                          std::string_view like_name,
                          const at::Tensor& like);

/// Checks of the plan that an op takes; `like` names the tensor whose device they
/// must share.
void check_plan(std::string_view op,
                const DispatchPlan& plan,
                std::string_view like_name,
                const at::Tensor& like);

}  // namespace torchmoe

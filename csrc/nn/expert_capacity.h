// How many slots an expert keeps: one capacity for all experts, in exact integers because a float
// product rounds 1.1 * 2 * 200 / 4 up to 111; or one each from the history of their load.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// A capacity factor as two integers in lowest terms: the nearest fraction with a denominator of at
/// most 10^6, so that 1.1 is 11/10 and 4.0 / 3 is 4/3. It is limited to 2^31, the most num_experts
/// that a layer may have.
class CapacityFactor {
 public:
  /// Implicit, so that a plain 1.25 can be passed as a factor. `op` and `argument` are for the
  /// error message only.
  /* implicit */ CapacityFactor(double factor,
                                std::string_view op = "expert_capacity",
                                std::string_view argument = "capacity_factor");

  int64_t numerator() const { return numerator_; }
  int64_t denominator() const { return denominator_; }

 private:
  int64_t numerator_;
  int64_t denominator_;
};

/// ceil(capacity_factor * top_k * num_tokens / num_experts), with rounding "down" the floor; then
/// at least min_capacity, at most num_tokens; 0 for no tokens. In integers throughout.
int64_t expert_capacity(int64_t num_tokens,
                        int64_t num_experts,
                        int64_t top_k,
                        const CapacityFactor& capacity_factor,
                        int64_t min_capacity = 0,
                        std::string_view rounding = "up");

/// The same for an int64 or int32 tensor of token counts, each up to 9 * 10^12 / num_experts; the
/// int64 result stays on its device: nothing is read back.
at::Tensor expert_capacity(const at::Tensor& num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           const CapacityFactor& capacity_factor,
                           int64_t min_capacity = 0,
                           std::string_view rounding = "up");

/// A capacity for each expert that follows its history: more room where the load has been high.
///
///     capacity_i = ceil(max(1, usage_i / mean(usage)) * factor * num_slots / num_experts)
///
/// in float64, where a relative excess below 1e-6 does not round up; at most num_slots. The demand
/// comes from this batch, the factor from past steps (`RouterImpl::usage`). With the current load
/// in both places no expert could ever ask for more than its capacity.
///
/// usage [E] floating, of which only the ratios matter; an entry that is not above the mean, NaN
/// included, counts as the mean. num_slots is top_k times the number of counted tokens, an int or
/// an integer scalar on usage's device -> [E] int64 there: nothing is read back.
at::Tensor dynamic_capacity(const at::Tensor& usage,
                            int64_t num_slots,
                            const CapacityFactor& factor = 1.0);
at::Tensor dynamic_capacity(const at::Tensor& usage,
                            const at::Tensor& num_slots,
                            const CapacityFactor& factor = 1.0);

}  // namespace torchmoe

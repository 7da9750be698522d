// How many slots an expert keeps: exact, because a float product rounds 1.1 * 2 * 200 / 4 up to
// 111.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// A capacity factor as the decimal number its author wrote (1.1 is 11/10), reduced to two
/// integers.
class CapacityFactor {
 public:
  /// Implicit, so that a plain 1.25 serves wherever a factor is asked for. `op` and `argument` are
  /// for the message only.
  /* implicit */ CapacityFactor(double factor,
                                const char* op = "expert_capacity",
                                const char* argument = "capacity_factor");

  int64_t numerator() const { return numerator_; }
  int64_t denominator() const { return denominator_; }

 private:
  int64_t numerator_;
  int64_t denominator_;
};

/// ceil(capacity_factor * top_k * num_tokens / num_experts), then at least min_capacity, at most
/// num_tokens; 0 for no tokens. In integers throughout.
int64_t expert_capacity(int64_t num_tokens,
                        int64_t num_experts,
                        int64_t top_k,
                        const CapacityFactor& capacity_factor,
                        int64_t min_capacity = 0);

/// The same for an int64 tensor of token counts, each at most 2^31, that stays on its device:
/// nothing is read back.
at::Tensor expert_capacity(const at::Tensor& num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           const CapacityFactor& capacity_factor,
                           int64_t min_capacity = 0);

}  // namespace torchmoe

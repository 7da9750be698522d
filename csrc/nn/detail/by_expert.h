// Slots seen by expert.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe::nn {

/// float32, or the type itself where that is wider.
at::ScalarType wide_type(at::ScalarType dtype);
/// The values in that type.
at::Tensor wide(const at::Tensor& values);

/// How often each expert is named along the last dimension: [..., N] int64 -> [..., E] int64. An id
/// outside [0, E) counts nowhere. Integers add up to the same in any order.
at::Tensor count(const at::Tensor& indices, int64_t num_experts);

/// Counts over their sum along the last dimension, 0 where nothing is counted; what is floating is
/// taken for shares already.
at::Tensor shares(const at::Tensor& counts, at::ScalarType dtype);

/// Which experts the slots [T, K] of each token name: [T, E] bool.
at::Tensor named(const at::Tensor& indices, int64_t num_experts);

}  // namespace torchmoe::nn

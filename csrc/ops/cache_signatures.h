#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// On which side of random hyperplanes each row lies, as numbers of L tables:
///
///     signatures[r, l] = sum over b of 2^b [<planes[l, b], x[r]> >= 0]
///
/// For two rows at angle a, one bit is the same with probability 1 - a / pi, if the planes' normals
/// are drawn from a normal distribution (Charikar 2002, "Similarity estimation techniques from
/// rounding algorithms"). A row of another length, but the same direction, has the same signatures.
///
/// x [R, G] floating; planes [L, B, G] floating, 1 <= B <= 62, converted to float32 (float64 for a
/// float64 x), in which the products are formed; row_mask [R] bool -> signatures [R, L] int64. A row
/// where row_mask is false, or whose length is 0, not a number or outside [1e-75, 1e75], has no
/// direction that could be compared: its signatures are -1. Not differentiable. On the CPU only.
at::Tensor cache_signatures(const at::Tensor& x,
                            const at::Tensor& planes,
                            const std::optional<at::Tensor>& row_mask = std::nullopt);

void check_cache_signatures(const at::Tensor& x,
                            const at::Tensor& planes,
                            const std::optional<at::Tensor>& row_mask);

}  // namespace torchmoe

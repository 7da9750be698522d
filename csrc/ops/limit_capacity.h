#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// Serves the slots in an order; expert e keeps the first capacity[e] slots that ask for it, every
/// later one becomes -1.
///
///     order "choice"   every token's first choice in token order, then all second choices, and so
///                      on (GShard, arXiv 2006.16668)
///     order "token"    token by token, first choice before second: the only one in which a token's
///                      fate never depends on later tokens
///     priority [T, K]  larger first over all slots, NaN last, equal ones by `order`
///     overflow "drop"  a slot that finds its expert full is dropped
///
/// indices [T, K] int64, an id outside [0, E) is passed on as -1 and takes no room; capacity [E]
/// int64, a negative entry keeps nothing; priority [T, K] floating -> indices [T, K] int64. Not
/// differentiable.
at::Tensor limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order = "choice",
                          const std::optional<at::Tensor>& priority = std::nullopt,
                          std::string_view overflow = "drop");

void check_limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow);

}  // namespace torchmoe

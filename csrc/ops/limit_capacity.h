#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// Serves the slots one after another; expert e keeps the first capacity[e] slots that it gets. A
/// slot whose expert is full overflows: it is given to another expert at once, before the next slot
/// is served, or becomes -1.
///
///     order "choice"        every token's first choice in token order, then all second choices,
///                           and so on (GShard, arXiv 2006.16668)
///     order "token"         token by token, first choice before second: the only order in which a
///                           token's fate never depends on later tokens
///     priority [T, K]       larger first over all slots, NaN last, equal ones by `order`
///     overflow "drop"       the slot is dropped
///     overflow "next_best"  it goes to the best expert by scores[t] (ties to the larger
///                           tie_break[t], then to the lower id; NaN last) that has room and that no
///                           other slot of the token names, served or not; if there is none it is
///                           dropped
///     overflow "backup"     it goes to backup[e] under the same two conditions; otherwise as in
///                           "next_best"
///
/// indices [T, K] int64, an id outside [0, E) is passed on as -1 and takes no room; capacity [E]
/// int64 >= 0; priority [T, K] floating; scores [T, E] floating, with "next_best" and "backup"
/// only; backup [E] int64, an expert other than e for each e, with "backup" only; tie_break [T, E]
/// floating, with scores only -> indices [T, K] int64. Not differentiable. The entries of capacity
/// and backup are checked unless that would wait for a device. Without the check a negative
/// capacity keeps nothing, and a backup that does not exist has no room.
at::Tensor limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order = "choice",
                          const std::optional<at::Tensor>& priority = std::nullopt,
                          std::string_view overflow = "drop",
                          const std::optional<at::Tensor>& scores = std::nullopt,
                          const std::optional<at::Tensor>& backup = std::nullopt,
                          const std::optional<at::Tensor>& tie_break = std::nullopt);

void check_limit_capacity(const at::Tensor& indices,
                          const at::Tensor& capacity,
                          std::string_view order,
                          const std::optional<at::Tensor>& priority,
                          std::string_view overflow,
                          const std::optional<at::Tensor>& scores,
                          const std::optional<at::Tensor>& backup,
                          const std::optional<at::Tensor>& tie_break);

/// Checks the entries of the two tables, for kernels that can read them.
void check_limit_capacity_entries(at::IntArrayRef capacity, std::optional<at::IntArrayRef> backup);
/// Checks the entries of a backup table, one for each expert.
void check_backup(std::string_view op, at::IntArrayRef backup);

}  // namespace torchmoe

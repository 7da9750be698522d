// Which parts of a layer are compatible: one table of pairs that are not, with the reasons.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "nn/moe.h"

namespace torchmoe::nn {

/// The router's usage [E], undefined where it keeps none.
at::Tensor usage_of(const TokenFunction& router);

/// What reads the router's usage.
std::vector<std::string> usage_readers(const Balance& balance,
                                       const std::optional<Capacity>& capacity,
                                       bool has_assistance);

/// What of a layer reads something that `MoEImpl::update` moves, the first of them; empty where
/// nothing does.
std::string update_reader(const MoEImpl& layer);

/// How many experts every token is sure to get.
int64_t least_experts(const Estimator& estimator);

/// Throws c10::ValueError for the first pair of the layer's parts, with these settings, that is not
/// compatible.
void check_pairs(const MoEImpl& layer,
                 const Balance& balance,
                 const std::optional<Capacity>& capacity);

}  // namespace torchmoe::nn

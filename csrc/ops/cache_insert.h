#pragma once

#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "cache_table.h"

namespace torchmoe {

/// When each entry was last used, and how often.
struct CacheUse {
  /// [M] int64, counted in rows; of a free entry ignored.
  at::Tensor last_used;
  /// [M] int64, the same.
  at::Tensor uses;

  auto fields() const { return std::tie(last_used, uses); }
};

/// Which rows become entries. The rows are taken one by one, in order. One that is similar to an
/// entry, as cache_lookup says, uses it; any other one, and it alone, takes the lowest free entry or,
/// where none is free, evicts one:
///
///     lru   the one that was used longest ago
///     lfu   the one that was used least often, of several the one that was used longest ago
///
/// Rows see the entries that earlier rows have taken. A row with -1 in the first column of its
/// signatures is passed over. The k-th row counts as time max(last_used) + 1 + k.
///
/// x [R, G], signatures [R, L], the table and similarity as in cache_lookup -> row [M] int64, the row
/// that has taken the entry last, -1 where it was left as it is; last_used and uses [M], moved. Not
/// differentiable. On the CPU only.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cache_insert(const at::Tensor& x,
                                                            const at::Tensor& signatures,
                                                            const CacheTable& table,
                                                            const CacheUse& use,
                                                            double similarity,
                                                            std::string_view eviction);

void check_cache_insert(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const CacheUse& use,
                        double similarity,
                        std::string_view eviction);

}  // namespace torchmoe

#pragma once

#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// What a cache knows of its entries' keys.
struct CacheTable {
  /// [M, G], float32 (float64 for float64 rows).
  at::Tensor keys;
  /// [M, L] int64, of cache_signatures; -1 in the first column: the entry is free.
  at::Tensor key_signatures;

  auto fields() const { return std::tie(keys, key_signatures); }
};

/// Checks of rows x [R, G] with their signatures [R, L], and of the table that they are compared
/// with. 0 < similarity <= 1.
void check_cache_table(std::string_view op,
                       const at::Tensor& x,
                       const at::Tensor& signatures,
                       const CacheTable& table,
                       double similarity);

}  // namespace torchmoe

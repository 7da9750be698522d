#pragma once

#include <ATen/core/Tensor.h>

#include "cache_table.h"

namespace torchmoe {

/// The entry whose key is nearest to each row, among those similar to it:
///
///     <x, k> / (|x| |k|) >= similarity   and   similarity <= |x| / |k| <= 1 / similarity
///
/// Only entries with an equal signature in one of the L tables are compared; their lengths, products
/// and distances |x - k| are formed in float64. Of several that are similar the nearest is taken, of
/// equally near ones the lowest, so that a row equal to a key finds that key, or an equal one.
///
/// x [R, G] floating; signatures [R, L] int64, a row with -1 in its first column finds nothing; the
/// table; order [L, M] int64, for each table the entries by signature, equal ones by number, as a
/// stable sort gives them: in another order, or with numbers outside [0, M), entries are not found ->
/// entry [R] int64, -1 = none. Not differentiable. On the CPU only.
at::Tensor cache_lookup(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const at::Tensor& order,
                        double similarity);

void check_cache_lookup(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const at::Tensor& order,
                        double similarity);

}  // namespace torchmoe

#include "ops/cache_table.h"

#include "common/checks.h"
#include "common/dtypes.h"

namespace torchmoe {

void check_cache_table(std::string_view op,
                       const at::Tensor& x,
                       const at::Tensor& signatures,
                       const CacheTable& table,
                       double similarity) {
  const auto& [keys, key_signatures] = table;
  check_dim(op, "x", x, 2, "[num_rows, key_size]");
  check_floating(op, "x", x);
  check_cpu(op, "x", x);
  check_dim(op, "signatures", signatures, 2, "[num_rows, num_tables]");
  check_shape(op,
              "signatures",
              signatures,
              {x.sym_size(0), signatures.sym_size(1)},
              "[num_rows, num_tables]");
  TORCH_CHECK(signatures.sym_size(1) >= 1,
              op,
              ": signatures must have at least one table, got shape ",
              signatures.sym_sizes());
  check_dtype(op, "signatures", signatures, at::kLong);
  check_same_device(op, "signatures", signatures, "x", x);
  check_dim(op, "keys", keys, 2, "[num_entries, key_size]");
  check_shape(op, "keys", keys, {keys.sym_size(0), x.sym_size(1)}, "[num_entries, key_size of x]");
  check_dtype(op, "keys", keys, accumulate_dtype(x.scalar_type()));
  check_same_device(op, "keys", keys, "x", x);
  check_shape(op,
              "key_signatures",
              key_signatures,
              {keys.sym_size(0), signatures.sym_size(1)},
              "[num_entries, num_tables]");
  check_dtype(op, "key_signatures", key_signatures, at::kLong);
  check_same_device(op, "key_signatures", key_signatures, "x", x);
  TORCH_CHECK_VALUE(
      similarity > 0 && similarity <= 1, op, ": similarity must be in (0, 1], got ", similarity);
}

}  // namespace torchmoe

#include "ops/cache_lookup.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor cache_lookup(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const at::Tensor& order,
                        double similarity) {
  static const auto op = find_op<decltype(cache_lookup)>("torchmoe::cache_lookup");
  return call(op, x, signatures, table, order, similarity);
}

void check_cache_lookup(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const at::Tensor& order,
                        double similarity) {
  constexpr auto op = "cache_lookup";
  check_cache_table(op, x, signatures, table, similarity);
  check_shape(op,
              "order",
              order,
              {signatures.sym_size(1), table.keys.sym_size(0)},
              "[num_tables, num_entries]");
  check_dtype(op, "order", order, at::kLong);
  check_same_device(op, "order", order, "x", x);
}

namespace {

at::Tensor cache_lookup_meta(const at::Tensor& x,
                             const at::Tensor& signatures,
                             const CacheTable& table,
                             const at::Tensor& order,
                             double similarity) {
  check_cache_lookup(x, signatures, table, order, similarity);
  return at::empty_symint({x.sym_size(0)}, signatures.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("cache_lookup", with_records<&cache_lookup_meta>);
}

}  // namespace torchmoe

#include "ops/cache_insert.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"
#include "common/vocabulary.h"

namespace torchmoe {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cache_insert(const at::Tensor& x,
                                                            const at::Tensor& signatures,
                                                            const CacheTable& table,
                                                            const CacheUse& use,
                                                            double similarity,
                                                            std::string_view eviction) {
  static const auto op = find_op<decltype(cache_insert)>("torchmoe::cache_insert");
  return call(op, x, signatures, table, use, similarity, eviction);
}

void check_cache_insert(const at::Tensor& x,
                        const at::Tensor& signatures,
                        const CacheTable& table,
                        const CacheUse& use,
                        double similarity,
                        std::string_view eviction) {
  constexpr auto op = "cache_insert";
  check_cache_table(op, x, signatures, table, similarity);
  const auto check_use = [&](std::string_view name, const at::Tensor& tensor) {
    check_shape(op, name, tensor, {table.keys.sym_size(0)}, "[num_entries]");
    check_dtype(op, name, tensor, at::kLong);
    check_same_device(op, name, tensor, "x", x);
  };
  check_use("last_used", use.last_used);
  check_use("uses", use.uses);
  choose<Eviction>(op, eviction);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cache_insert_meta(const at::Tensor& x,
                                                                 const at::Tensor& signatures,
                                                                 const CacheTable& table,
                                                                 const CacheUse& use,
                                                                 double similarity,
                                                                 std::string_view eviction) {
  check_cache_insert(x, signatures, table, use, similarity, eviction);
  const auto of_entries = [&] {
    return at::empty_symint({table.keys.sym_size(0)}, signatures.options());
  };
  return {of_entries(), of_entries(), of_entries()};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("cache_insert", with_records<&cache_insert_meta>);
}

}  // namespace torchmoe

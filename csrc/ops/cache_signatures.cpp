#include "ops/cache_signatures.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor cache_signatures(const at::Tensor& x,
                            const at::Tensor& planes,
                            const std::optional<at::Tensor>& row_mask) {
  static const auto op = find_op<decltype(cache_signatures)>("torchmoe::cache_signatures");
  return op.call(x, planes, row_mask);
}

void check_cache_signatures(const at::Tensor& x,
                            const at::Tensor& planes,
                            const std::optional<at::Tensor>& row_mask) {
  constexpr auto op = "cache_signatures";
  constexpr int64_t kMostBits = 62;
  check_dim(op, "x", x, 2, "[num_rows, key_size]");
  check_floating(op, "x", x);
  check_cpu(op, "x", x);
  check_dim(op, "planes", planes, 3, "[num_tables, num_bits, key_size]");
  check_shape(op,
              "planes",
              planes,
              {planes.sym_size(0), planes.sym_size(1), x.sym_size(1)},
              "[num_tables, num_bits, key_size of x]");
  TORCH_CHECK(planes.sym_size(1) >= 1 && planes.sym_size(1) <= kMostBits,
              op,
              ": planes must have 1 to ",
              kMostBits,
              " bits, got shape ",
              planes.sym_sizes());
  check_floating(op, "planes", planes);
  check_same_device(op, "planes", planes, "x", x);
  if (row_mask) {
    check_shape(op, "row_mask", *row_mask, {x.sym_size(0)}, "[num_rows]");
    check_dtype(op, "row_mask", *row_mask, at::kBool);
    check_same_device(op, "row_mask", *row_mask, "x", x);
  }
}

namespace {

at::Tensor cache_signatures_meta(const at::Tensor& x,
                                 const at::Tensor& planes,
                                 const std::optional<at::Tensor>& row_mask) {
  check_cache_signatures(x, planes, row_mask);
  return at::empty_symint({x.sym_size(0), planes.sym_size(0)}, x.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("cache_signatures", &cache_signatures_meta);
}

}  // namespace torchmoe

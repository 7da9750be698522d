#include <algorithm>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/similar_keys.h"
#include "ops/cache_lookup.h"

namespace torchmoe {

namespace {

// Entries that a row is compared with, about, where it is decided how many rows are worth a thread.
constexpr int64_t kCompared = 4;

/// The entries of each table by signature.
struct SortedEntries {
  const int64_t* signatures;  // [M, L]
  const int64_t* order;       // [L, M]
  int64_t num_entries;
  int64_t num_tables;

  /// visit(entry) once for each entry that shares a signature with the row.
  template <typename Visit>
  void for_each_sharing(const int64_t* row, const Visit& visit) const {
    for (int64_t table = 0; table < num_tables; ++table) {
      const int64_t sought = row[table];
      if (sought < 0) {
        continue;
      }
      // A number that is no entry's counts as a free entry.
      const auto signature_of = [&](int64_t entry) {
        return entry < 0 || entry >= num_entries ? -1 : signatures[entry * num_tables + table];
      };
      const int64_t* begin = order + table * num_entries;
      const int64_t* end = begin + num_entries;
      const int64_t* at = std::lower_bound(
          begin, end, sought, [&](int64_t entry, int64_t s) { return signature_of(entry) < s; });
      for (; at != end && signature_of(*at) == sought; ++at) {
        const int64_t* of_entry = signatures + *at * num_tables;
        if (of_entry[0] >= 0 && !cpu::share_signature(row, of_entry, table)) {
          visit(*at);
        }
      }
    }
  }
};

at::Tensor cache_lookup_kernel(const at::Tensor& x,
                               const at::Tensor& signatures,
                               const CacheTable& table,
                               const at::Tensor& order,
                               double similarity) {
  check_cache_lookup(x, signatures, table, order, similarity);
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto x_acc = contiguous_as(x, acc);
  const auto keys = table.keys.contiguous();
  const auto signatures_c = signatures.contiguous();
  const auto key_signatures = table.key_signatures.contiguous();
  const auto order_c = order.contiguous();
  auto entries = at::empty({x.size(0)}, signatures.options());
  const int64_t width = x.size(1);
  const int64_t num_tables = signatures.size(1);
  const SortedEntries sorted{key_signatures.const_data_ptr<int64_t>(),
                             order_c.const_data_ptr<int64_t>(),
                             keys.size(0),
                             num_tables};
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* x_data = x_acc.const_data_ptr<scalar_t>();
    const auto* key_data = keys.const_data_ptr<scalar_t>();
    const auto* row_signatures = signatures_c.const_data_ptr<int64_t>();
    auto* out = entries.mutable_data_ptr<int64_t>();
    cpu::parallel_items(x.size(0), kCompared * width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t* of_row = row_signatures + r * num_tables;
        cpu::Nearest nearest;
        if (of_row[0] >= 0) {
          const cpu::Sought sought(x_data + r * width, width, similarity);
          sorted.for_each_sharing(of_row, [&](int64_t entry) {
            nearest.show(entry, sought.distance_if_similar(key_data + entry * width));
          });
        }
        out[r] = nearest.entry();
      }
    });
  });
  return entries;
}

}  // namespace

// Whatever the device: where it is not the CPU, the check says so.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("cache_lookup", with_records<&cache_lookup_kernel>);
}

}  // namespace torchmoe

// One row after another, since each sees what the rows before it have changed.
#include <algorithm>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <ATen/ops/full.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cpu/similar_keys.h"
#include "ops/cache_insert.h"

namespace torchmoe {

namespace {

/// The entries that have a signature, for each table. An entry that has changed hands stays listed
/// under its old signatures, and is passed over there.
class Buckets {
 public:
  explicit Buckets(int64_t num_tables) : tables_(num_tables) {}

  void add(int64_t entry, const int64_t* signatures) {
    for (auto& table : tables_) {
      table[*signatures++].push_back(entry);
    }
  }

  /// visit(entry) for every entry that has, or had, a signature of the row; some more than once.
  template <typename Visit>
  void for_each_listed(const int64_t* row, const Visit& visit) const {
    for (const auto& table : tables_) {
      if (const auto found = table.find(*row++); found != table.end()) {
        std::for_each(found->second.begin(), found->second.end(), visit);
      }
    }
  }

 private:
  std::vector<std::unordered_map<int64_t, std::vector<int64_t>>> tables_;
};

/// The entries in the order in which they give way.
class EvictionOrder {
 public:
  EvictionOrder(Eviction eviction, const int64_t* last_used, const int64_t* uses)
      : by_use_(eviction == Eviction::lfu), last_used_(last_used), uses_(uses) {}

  int64_t first() const { return std::get<2>(*order_.begin()); }
  void add(int64_t entry) { order_.insert(rank_of(entry)); }
  void remove(int64_t entry) { order_.erase(rank_of(entry)); }

 private:
  using Rank = std::tuple<int64_t, int64_t, int64_t>;

  Rank rank_of(int64_t entry) const {
    return {by_use_ ? uses_[entry] : 0, last_used_[entry], entry};
  }

  bool by_use_;
  const int64_t* last_used_;
  const int64_t* uses_;
  std::set<Rank> order_;
};

/// A table while rows are inserted.
template <typename T>
class Entries {
 public:
  struct Sizes {
    int64_t entries;
    int64_t width;
    int64_t tables;
  };
  /// Keys with their signatures.
  struct Keys {
    const T* data;              // [n, G]
    const int64_t* signatures;  // [n, L]
  };
  /// What moves: [M] each.
  struct Moved {
    int64_t* row;
    int64_t* last_used;
    int64_t* uses;
  };

  Entries(
      const Sizes& sizes, const Keys& keys, const Keys& rows, const Moved& moved, Eviction eviction)
      : sizes_(sizes),
        rows_(rows),
        moved_(moved),
        buckets_(sizes.tables),
        order_(eviction, moved.last_used, moved.uses) {
    for (int64_t entry = 0; entry < sizes.entries; ++entry) {
      const int64_t* signatures = keys.signatures + entry * sizes.tables;
      holders_.push_back({keys.data + entry * sizes.width, signatures});
      if (signatures[0] < 0) {
        free_.push_back(entry);
      } else {
        buckets_.add(entry, signatures);
        order_.add(entry);
        time_ = std::max(time_, moved.last_used[entry] + 1);
      }
    }
    std::reverse(free_.begin(), free_.end());
  }

  void take(int64_t row, double similarity) {
    const Holder holder{rows_.data + row * sizes_.width, rows_.signatures + row * sizes_.tables};
    if (holder.signatures[0] >= 0 && sizes_.entries > 0) {
      if (const int64_t entry = find(holder, similarity); entry >= 0) {
        use(entry, moved_.uses[entry] + 1);
      } else {
        replace(next_to_go(), holder, row);
      }
    }
    ++time_;
  }

 private:
  /// Whose key an entry has.
  struct Holder {
    const T* key;
    const int64_t* signatures;
  };

  int64_t find(const Holder& sought, double similarity) const {
    cpu::Nearest nearest;
    const cpu::Sought row(sought.key, sizes_.width, similarity);
    buckets_.for_each_listed(sought.signatures, [&](int64_t entry) {
      const auto& holder = holders_[entry];
      if (cpu::share_signature(sought.signatures, holder.signatures, sizes_.tables)) {
        nearest.show(entry, row.distance_if_similar(holder.key));
      }
    });
    return nearest.entry();
  }

  int64_t next_to_go() {
    if (free_.empty()) {
      return order_.first();
    }
    const int64_t entry = free_.back();
    free_.pop_back();
    order_.add(entry);
    return entry;
  }

  void replace(int64_t entry, const Holder& holder, int64_t row) {
    holders_[entry] = holder;
    buckets_.add(entry, holder.signatures);
    moved_.row[entry] = row;
    use(entry, 1);
  }

  void use(int64_t entry, int64_t uses) {
    order_.remove(entry);
    moved_.uses[entry] = uses;
    moved_.last_used[entry] = time_;
    order_.add(entry);
  }

  Sizes sizes_;
  Keys rows_;
  Moved moved_;
  std::vector<Holder> holders_;
  std::vector<int64_t> free_;  // the lowest last
  Buckets buckets_;
  EvictionOrder order_;
  int64_t time_ = 0;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> cache_insert_kernel(const at::Tensor& x,
                                                                   const at::Tensor& signatures,
                                                                   const CacheTable& table,
                                                                   const CacheUse& use,
                                                                   double similarity,
                                                                   std::string_view eviction) {
  check_cache_insert(x, signatures, table, use, similarity, eviction);
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto x_acc = contiguous_as(x, acc);
  const auto keys = table.keys.contiguous();
  const auto signatures_c = signatures.contiguous();
  const auto key_signatures = table.key_signatures.contiguous();
  auto row = at::full({keys.size(0)}, -1, signatures.options());
  auto last_used = use.last_used.clone(at::MemoryFormat::Contiguous);
  auto uses = use.uses.clone(at::MemoryFormat::Contiguous);
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    using Table = Entries<scalar_t>;
    Table entries({keys.size(0), x.size(1), signatures.size(1)},
                  {keys.const_data_ptr<scalar_t>(), key_signatures.const_data_ptr<int64_t>()},
                  {x_acc.const_data_ptr<scalar_t>(), signatures_c.const_data_ptr<int64_t>()},
                  {row.mutable_data_ptr<int64_t>(),
                   last_used.mutable_data_ptr<int64_t>(),
                   uses.mutable_data_ptr<int64_t>()},
                  choose<Eviction>("cache_insert", eviction));
    for (int64_t r = 0; r < x.size(0); ++r) {
      entries.take(r, similarity);
    }
  });
  return {row, last_used, uses};
}

}  // namespace

// Whatever the device: where it is not the CPU, the check says so.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("cache_insert", with_records<&cache_insert_kernel>);
}

}  // namespace torchmoe

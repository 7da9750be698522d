#include <algorithm>
#include <optional>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/rank.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "ops/limit_capacity.h"

namespace torchmoe {

namespace {

/// Calls serve(slot) for every slot in the order that they are served.
template <typename Serve>
void in_order(CapacityOrder order, int64_t num_tokens, int64_t top_k, const Serve& serve) {
  if (order == CapacityOrder::token) {
    for (int64_t slot = 0; slot < num_tokens * top_k; ++slot) {
      serve(slot);
    }
    return;
  }
  for (int64_t j = 0; j < top_k; ++j) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      serve(t * top_k + j);
    }
  }
}

/// The same with larger priorities first and NaN last; the stable sort leaves equal ones in
/// `order`.
template <typename Serve>
void in_priority_order(const double* priority,
                       CapacityOrder order,
                       int64_t num_tokens,
                       int64_t top_k,
                       const Serve& serve) {
  // The priority travels with its slot: looked up at every comparison it would miss the cache.
  struct Ranked {
    double priority;
    int64_t slot;
  };
  std::vector<Ranked> slots;
  slots.reserve(num_tokens * top_k);
  in_order(
      order, num_tokens, top_k, [&](int64_t slot) { slots.push_back({priority[slot], slot}); });
  std::stable_sort(slots.begin(), slots.end(), [](const Ranked& a, const Ranked& b) {
    return ranks_before(a.priority, b.priority);
  });
  for (const auto& ranked : slots) {
    serve(ranked.slot);
  }
}

/// How many more slots each expert takes.
class Room {
 public:
  Room(const int64_t* capacity, int64_t num_experts) : left_(capacity, capacity + num_experts) {
    for (int64_t e = 0; e < num_experts; ++e) {
      if (left_[e] > 0) {
        open_.push_back(e);
      }
    }
  }

  int64_t num_experts() const { return static_cast<int64_t>(left_.size()); }

  /// Gives a place of the expert away, if it has one.
  bool take(int64_t expert) {
    if (left_[expert] <= 0) {
      return false;
    }
    if (--left_[expert] == 0) {
      open_.erase(std::lower_bound(open_.begin(), open_.end(), expert));
    }
    return true;
  }

  /// The experts with room, in ascending order. A full expert stays full, so that this only gets
  /// shorter, and a search through it is over at once where nothing is left.
  const std::vector<int64_t>& open() const { return open_; }

 private:
  std::vector<int64_t> left_;
  std::vector<int64_t> open_;
};

/// Finds another expert for a slot whose own is full.
template <typename T>
class Rerouter {
 public:
  Rerouter(const T* scores,
           const T* tie_break,
           const int64_t* backup,
           int64_t top_k,
           int64_t num_experts)
      : scores_(scores),
        tie_break_(tie_break),
        backup_(backup),
        top_k_(top_k),
        named_by_(num_experts, -1) {}

  /// The new expert, its place taken, or -1. `choices` are the token's slots: experts served and
  /// those asked for by slots that wait, -1 where nothing is named.
  int64_t reroute(int64_t slot, int64_t expert, const int64_t* choices, Room& room) {
    if (room.open().empty()) {
      return -1;
    }
    for (int64_t j = 0; j < top_k_; ++j) {
      if (choices[j] >= 0) {
        named_by_[choices[j]] = slot;
      }
    }
    if (backup_ != nullptr) {
      const int64_t other = backup_[expert];
      if (named_by_[other] != slot && room.take(other)) {
        return other;
      }
    }
    const int64_t best = best_open(slot, room);
    if (best >= 0) {
      room.take(best);
    }
    return best;
  }

 private:
  int64_t best_open(int64_t slot, const Room& room) const {
    const int64_t row = slot / top_k_ * room.num_experts();
    const auto score = [&](int64_t e) {
      return Ranked<T>{scores_[row + e], tie_break_ == nullptr ? T(0) : tie_break_[row + e]};
    };
    int64_t best = -1;
    for (const int64_t e : room.open()) {
      if (named_by_[e] != slot && (best < 0 || ranks_before(score(e), score(best)))) {
        best = e;
      }
    }
    return best;
  }

  const T* scores_;
  const T* tie_break_;
  const int64_t* backup_;
  int64_t top_k_;
  /// The slot whose token was last seen to name the expert: no need to clear marks.
  std::vector<int64_t> named_by_;
};

/// indices [T, K], the expert that each slot asks for.
struct Slots {
  const int64_t* indices;
  int64_t num_tokens;
  int64_t top_k;

  int64_t count() const { return num_tokens * top_k; }
};

/// Without a rerouter a slot that finds its expert full is dropped.
template <typename T>
void limit_capacity_kernel_impl(const Slots& slots,
                                const double* priority,
                                CapacityOrder order,
                                Room& room,
                                Rerouter<T>* rerouter,
                                int64_t* limited) {
  const int64_t num_experts = room.num_experts();
  std::transform(slots.indices, slots.indices + slots.count(), limited, [&](int64_t expert) {
    return expert >= 0 && expert < num_experts ? expert : -1;
  });
  const auto serve = [&](int64_t slot) {
    const int64_t expert = limited[slot];
    if (expert < 0 || room.take(expert)) {
      return;
    }
    if (rerouter == nullptr) {
      limited[slot] = -1;
      return;
    }
    const int64_t* choices = limited + slot / slots.top_k * slots.top_k;
    limited[slot] = rerouter->reroute(slot, expert, choices, room);
  };
  if (priority == nullptr) {
    in_order(order, slots.num_tokens, slots.top_k, serve);
  } else {
    in_priority_order(priority, order, slots.num_tokens, slots.top_k, serve);
  }
}

at::IntArrayRef entries(const at::Tensor& table) {
  return {table.const_data_ptr<int64_t>(), static_cast<size_t>(table.numel())};
}

at::Tensor limit_capacity_kernel(const at::Tensor& indices,
                                 const at::Tensor& capacity,
                                 std::string_view order,
                                 const std::optional<at::Tensor>& priority,
                                 std::string_view overflow,
                                 const std::optional<at::Tensor>& scores,
                                 const std::optional<at::Tensor>& backup,
                                 const std::optional<at::Tensor>& tie_break) {
  check_limit_capacity(indices, capacity, order, priority, overflow, scores, backup, tie_break);
  const auto indices_c = indices.contiguous();
  const auto capacity_c = capacity.contiguous();
  const auto backup_c = contiguous_as(backup, at::kLong);
  check_limit_capacity_entries(entries(capacity_c),
                               backup_c ? std::optional(entries(*backup_c)) : std::nullopt);
  // float64 holds every other floating type exactly, so one instance ranks all priorities. Scores
  // are E / K times as many: theirs are widened no more than they must be.
  const auto priority_c = contiguous_as(priority, at::kDouble);
  const auto acc = scores ? accumulate_dtype(scores->scalar_type()) : at::kFloat;
  const auto scores_c = contiguous_as(scores, acc);
  const auto tie_break_c = contiguous_as(tie_break, acc);
  auto limited = at::empty(indices.sizes(), indices.options());
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    Room room(capacity_c.const_data_ptr<int64_t>(), capacity.size(0));
    std::optional<Rerouter<scalar_t>> rerouter;
    if (scores_c) {
      rerouter.emplace(scores_c->const_data_ptr<scalar_t>(),
                       data_or_null<scalar_t>(tie_break_c),
                       data_or_null<int64_t>(backup_c),
                       indices.size(1),
                       capacity.size(0));
    }
    limit_capacity_kernel_impl(
        Slots{indices_c.const_data_ptr<int64_t>(), indices.size(0), indices.size(1)},
        data_or_null<double>(priority_c),
        choose<CapacityOrder>("limit_capacity", order),
        room,
        rerouter ? &*rerouter : nullptr,
        limited.mutable_data_ptr<int64_t>());
  });
  return limited;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("limit_capacity", &limit_capacity_kernel);
}

}  // namespace torchmoe

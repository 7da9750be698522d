// When two rows are similar: what the lookup of a cache and its insertion must agree on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace torchmoe::cpu {

/// <a, a>, <a, b>, <b, b> and <a - b, a - b>. float64, so that rounding lets no key in whose
/// similarity is below the bound.
struct Comparison {
  double a_squared = 0;
  double product = 0;
  double b_squared = 0;
  double distance_squared = 0;
};

/// Summed in interleaved lanes that are added in order, as cpu::dot does: equal rows give four equal
/// sums and the distance 0.
template <typename T>
Comparison compare_rows(const T* a, const T* b, int64_t size) {
  constexpr int64_t kLanes = 8;
  Comparison lanes[kLanes] = {};
  const auto add = [&](int64_t i, Comparison& lane) {
    const auto x = static_cast<double>(a[i]);
    const auto y = static_cast<double>(b[i]);
    lane.a_squared += x * x;
    lane.product += x * y;
    lane.b_squared += y * y;
    lane.distance_squared += (x - y) * (x - y);
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add(i + lane, lanes[lane]);
    }
  }
  for (; i < size; ++i) {
    add(i, lanes[i % kLanes]);
  }
  Comparison sum;
  for (const auto& lane : lanes) {
    sum.a_squared += lane.a_squared;
    sum.product += lane.product;
    sum.b_squared += lane.b_squared;
    sum.distance_squared += lane.distance_squared;
  }
  return sum;
}

/// The squared distance of two rows that are similar. Squares are compared, so that a row is similar
/// to itself at a similarity of 1; a comparison with NaN is false.
template <typename T>
std::optional<double> distance_if_similar(const T* a, const T* b, int64_t size, double similarity) {
  const auto [aa, ab, bb, distance] = compare_rows(a, b, size);
  const double bound = similarity * similarity;
  const bool has_direction = ab > 0 && ab * ab >= bound * (aa * bb);
  const bool has_length = aa >= bound * bb && bb >= bound * aa;
  return has_direction && has_length ? std::optional(distance) : std::nullopt;
}

/// Whether two rows have the same signature in one of the tables. Negative ones stand for none.
inline bool share_signature(const int64_t* a, const int64_t* b, int64_t num_tables) {
  for (int64_t table = 0; table < num_tables; ++table) {
    if (a[table] >= 0 && a[table] == b[table]) {
      return true;
    }
  }
  return false;
}

/// The nearest of the entries that it is shown, of equally near ones the lowest.
class Nearest {
 public:
  void show(int64_t entry, std::optional<double> distance) {
    if (distance &&
        (entry_ < 0 || *distance < distance_ || (*distance == distance_ && entry < entry_))) {
      entry_ = entry;
      distance_ = *distance;
    }
  }

  /// -1 if none was similar.
  int64_t entry() const { return entry_; }

 private:
  int64_t entry_ = -1;
  double distance_ = 0;
};

}  // namespace torchmoe::cpu

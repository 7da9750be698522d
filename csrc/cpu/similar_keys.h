// When two rows are similar: what the lookup of a cache and its insertion must agree on.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>

namespace torchmoe::cpu {

/// <a, a>, <a, b>, <b, b> and <a - b, a - b> in float64, so that rounding lets no key in whose
/// similarity is below the bound. Equal rows give three equal sums and the distance 0.
struct Comparison {
  double a_squared = 0;
  double product = 0;
  double b_squared = 0;
  double distance_squared = 0;
};

template <typename T>
Comparison compare_rows(const T* a, const T* b, int64_t size) {
  Comparison sum;
  for (int64_t i = 0; i < size; ++i) {
    const auto x = static_cast<double>(a[i]);
    const auto y = static_cast<double>(b[i]);
    sum.a_squared += x * x;
    sum.product += x * y;
    sum.b_squared += y * y;
    sum.distance_squared += (x - y) * (x - y);
  }
  return sum;
}

/// A row that keys are compared with, one after the other.
template <typename T>
class Sought {
 public:
  Sought(const T* row, int64_t size, double similarity)
      : row_(row),
        size_(size),
        similarity_(similarity),
        length_(std::sqrt(compare_rows(row, row, size).a_squared)) {}

  /// The squared distance of a key that is similar. Squares are compared, so that a row is similar
  /// to itself at a similarity of 1; a comparison with NaN is false.
  std::optional<double> distance_if_similar(const T* key) const {
    if (is_surely_apart(key)) {
      return std::nullopt;
    }
    const auto [aa, ab, bb, distance] = compare_rows(row_, key, size_);
    const double bound = similarity_ * similarity_;
    const bool has_direction = ab > 0 && ab * ab >= bound * (aa * bb);
    const bool has_length = aa >= bound * bb && bb >= bound * aa;
    return has_direction && has_length ? std::optional(distance) : std::nullopt;
  }

 private:
  /// Most keys that share a signature are not similar, which sums in T show in a fraction of the
  /// time. A sum of n terms is off by less than n eps times the sum of their magnitudes, which
  /// |a| |b| bounds for the product.
  bool is_surely_apart(const T* key) const {
    // Lanes that are added in order let the compiler use vector registers.
    constexpr int64_t kLanes = 16;
    T products[kLanes] = {};
    T squares[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        products[lane] += row_[i + lane] * key[i + lane];
        squares[lane] += key[i + lane] * key[i + lane];
      }
    }
    for (; i < size_; ++i) {
      products[0] += row_[i] * key[i];
      squares[0] += key[i] * key[i];
    }
    const double product = std::accumulate(products, products + kLanes, 0.0);
    const double squared = std::accumulate(squares, squares + kLanes, 0.0);
    const double error =
        static_cast<double>(size_ + kRoundings) * std::numeric_limits<T>::epsilon();
    // Outside, squares in float32 lose digits or overflow.
    const bool is_exact_enough = squared > 1e-25 && squared < 1e35;
    return is_exact_enough && product < (similarity_ - 2 * error) * length_ * std::sqrt(squared);
  }

  static constexpr int64_t kRoundings = 32;  // of what is not a sum, amply

  const T* row_;
  int64_t size_;
  double similarity_;
  double length_;
};

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

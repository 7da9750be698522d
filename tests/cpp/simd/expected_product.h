// Products in float64, and how far a float32 result may be from them.
//
// A float32 sum of k products, in any order and with or without fused operations, is off by at most
// gamma_k = k u / (1 - k u) times the sum of the products' magnitudes, u = 2^-24: no product passes
// more than k roundings, its own and k - 1 additions (Higham, Accuracy and Stability of Numerical
// Algorithms, section 3.1). Where aarch64 adds two bfloat16 products to a sum, the products are
// exact and both additions are rounded to odd, which is off by up to 2 u: a product passes at most
// (k + 1) / 2 of them, so that the bound is gamma_(k + 1), at most (k + 2) u for k <= 4000. What
// float64 rounds lies within the half u or more that this leaves.
#pragma once

#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "simd/matrix.h"
#include "simd/memory.h"

namespace torchmoe::test {

inline const std::vector<std::pair<cpu::Form, const char*>> kForms = {
    {cpu::Form::nt, "nt"}, {cpu::Form::nn, "nn"}, {cpu::Form::tn, "tn"}};

struct ExpectedProduct {
  Matrix sums;
  Matrix tolerance;
};

/// Of a rounding of the sums of a product whose right operand is of this type. That of float64 is
/// doubled, as its sums are as exact as what they are compared with.
inline double unit_of_sums(cpu::Element right) {
  return right == cpu::Element::float64 ? 0x1p-52 : kUnit;
}

/// left [m, k] times right [k, n].
inline ExpectedProduct expected_product(const Matrix& left,
                                        const Matrix& right,
                                        double unit = kUnit) {
  const double factor = (static_cast<double>(left.columns()) + 2) * unit;
  auto [sums, sizes] = product(left, right);
  return {std::move(sums), sizes.map([&](double x) { return factor * x; })};
}

/// Empty when every element is within the tolerance, or the very inf or a NaN that is expected.
inline std::string mismatch(const Matrix& actual, const ExpectedProduct& expected) {
  int64_t wrong = 0;
  std::ostringstream text;
  text.precision(10);
  for (int64_t i = 0; i < actual.rows(); ++i) {
    for (int64_t j = 0; j < actual.columns(); ++j) {
      const double a = actual(i, j), b = expected.sums(i, j), allowed = expected.tolerance(i, j);
      const bool is_right = std::isfinite(b) ? std::fabs(a - b) <= allowed
                                             : a == b || (std::isnan(a) && std::isnan(b));
      if (!is_right && ++wrong == 1) {
        text << "[" << i << ", " << j << "]: " << a << " instead of " << b << ", allowed "
             << allowed;
      }
    }
  }
  return wrong == 0 ? "" : std::to_string(wrong) + " wrong, the first at " + text.str();
}

}  // namespace torchmoe::test

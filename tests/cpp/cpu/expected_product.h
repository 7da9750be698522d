// Products in float64, and how far a float32 result may be from them.
//
// A float32 sum of k products, in any order and with or without fused operations, is off by at most
// gamma_k = k u / (1 - k u) times the sum of the products' magnitudes, u = 2^-24: no product passes
// more than k roundings, its own and k - 1 additions (Higham, Accuracy and Stability of Numerical
// Algorithms, section 3.1). gamma_k <= (k + 1) u for k <= 4000. What float64 rounds lies within the
// one u that this leaves.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gemm/product.h"
#include "cpu/instruction_sets.h"

namespace torchmoe::test {

inline const std::vector<std::pair<cpu::Form, const char*>> kForms = {
    {cpu::Form::nt, "nt"}, {cpu::Form::nn, "nn"}, {cpu::Form::tn, "tn"}};

struct ExpectedProduct {
  Tensor sums;
  Tensor tolerance;
};

/// Of a rounding of the sums of a product whose right operand is of this type. That of float64 is
/// doubled, as its sums are as exact as what they are compared with.
inline double unit_of_sums(at::ScalarType right) {
  return right == torch::kDouble ? 0x1p-52 : kUnit;
}

/// left [m, k] times right [k, n], float64.
inline ExpectedProduct expected_product(const Tensor& left,
                                        const Tensor& right,
                                        double unit = kUnit) {
  const auto terms = static_cast<double>(left.size(1));
  return {left.matmul(right), (terms + 1) * unit * left.abs().matmul(right.abs())};
}

/// Empty when every element is within the tolerance, or the very inf or a NaN that is expected.
inline std::string mismatch(const Tensor& actual, const ExpectedProduct& expected) {
  const Tensor a = actual.to(torch::kDouble);
  const Tensor& b = expected.sums;
  const Tensor error = (a - b).abs();
  if (error.le(expected.tolerance).logical_and_(b.isfinite()).all().item<bool>()) {
    return "";
  }
  const Tensor right =
      torch::where(b.isfinite(), error <= expected.tolerance, (a == b) | (a.isnan() & b.isnan()));
  if (right.all().item<bool>()) {
    return "";
  }
  const Tensor where = right.logical_not().nonzero();
  const auto i = where[0][0].item<int64_t>(), j = where[0][1].item<int64_t>();
  std::ostringstream text;
  text.precision(10);
  text << where.size(0) << " wrong, the first at [" << i << ", " << j
       << "]: " << a[i][j].item<double>() << " instead of " << b[i][j].item<double>()
       << ", allowed " << expected.tolerance[i][j].item<double>();
  return text.str();
}

}  // namespace torchmoe::test

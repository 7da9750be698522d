// Inputs and comparisons that several tests use.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "catch2.h"
#include "common/float_types.h"
#include "ops/dispatch_plan.h"
#include "testing.h"

namespace torchmoe::test {

using at::Tensor;
using torchmoe::testing::gradcheck;
using torchmoe::testing::gradgradcheck;
using torchmoe::testing::Tensors;

// The types of the library's tensors.
#define TORCHMOE_SCALAR_TYPE(type, scalar_type, name) at::ScalarType::scalar_type,
inline constexpr std::array kFloatTypes{TORCHMOE_FLOAT_TYPES(TORCHMOE_SCALAR_TYPE)};
#undef TORCHMOE_SCALAR_TYPE

// A sum of n terms is off by less than n eps times the sum of their magnitudes (Higham, Accuracy
// and Stability of Numerical Algorithms, section 4.2) and, as roundings differ in sign, by about
// sqrt(n) eps as a rule. n eps times the result lies between; the factor is for what is around it.
constexpr double kToleranceFactor = 4;

// The distance from 1 to the next number.
double epsilon(at::ScalarType dtype);

// Empty when |actual - expected| <= c * (terms * eps + rounded) * scale + eps' * |expected| in every
// entry, else the worst one. `terms` is the longest sum on the way; eps belongs to the type
// accumulated in (float64 for float64, else float32) and eps' to the type of the result; `rounded`
// adds up the eps of what is rounded on the way; scale is the largest |expected|, at least 1.
std::string difference(const Tensor& actual,
                       const Tensor& expected,
                       int64_t terms,
                       double rounded = 0);

// Equal up to the rounding of a few float64 operations, or of a value written with fewer digits.
inline Approx near(double value, double relative = 1e-12) {
  return Approx(value).epsilon(relative);
}

// Values in [-scale, scale], all different, without a random generator.
Tensor wave(at::IntArrayRef sizes,
            double phase = 0,
            double scale = 1,
            at::ScalarType dtype = torch::kFloat64);

// The same as a leaf that requires grad.
Tensor leaf(at::IntArrayRef sizes, double phase = 0, double scale = 1);

// The same values in other memory: every entry followed by a gap, the first two dimensions swapped.
Tensor strided(const Tensor& x);

// The values that every implementation of torchmoe is checked against: 12 tokens, 4 experts.
Tensor fixture_logits();
Tensor fixture_indices();

Tensor ids(const std::vector<std::vector<int64_t>>& rows);

// Choices among 4 experts for 5 tokens, in each situation that a kernel may get wrong.
struct Choice {
  const char* name;
  Tensor indices;
};
std::vector<Choice> choices();

bool same_plan(const DispatchPlan& a, const DispatchPlan& b);

}  // namespace torchmoe::test

#include "nn/expert_capacity.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/div.h>
#include <ATen/ops/min.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include "common/checks.h"
#include "common/vocabulary.h"
#include "nn/detail/checks.h"

namespace torchmoe {
namespace {

__extension__ typedef __int128 Wide;

constexpr int64_t kMostParts = 1'000'000;  // of a factor's denominator
constexpr int64_t kMostExperts = int64_t{1} << 31;

/// The nearest fraction to x with a denominator up to kMostParts, by the convergents of its
/// continued fraction, as Python's Fraction.limit_denominator.
std::pair<int64_t, int64_t> nearest_fraction(double x) {
  if (x >= kMostExperts) {
    return {kMostExperts, 1};
  }
  if (x <= 0.5 / kMostParts) {
    return {0, 1};
  }
  // x = mantissa / 2^shift, exactly; shift is at most 53 + 20.
  int exponent = 0;
  const auto mantissa = static_cast<int64_t>(std::ldexp(std::frexp(x, &exponent), 53));
  const Wide n = mantissa;
  const Wide d = Wide{1} << (53 - exponent);
  // Convergents before and at this step, and what is left of x beyond them.
  Wide before_n = 0, before_d = 1, at_n = 1, at_d = 0;
  for (Wide rest_n = n, rest_d = d; rest_d != 0;) {
    const Wide whole = rest_n / rest_d;
    const Wide next_d = before_d + whole * at_d;
    if (next_d > kMostParts) {
      // The last one in between that still fits lies on the other side of x.
      const Wide steps = (kMostParts - before_d) / at_d;
      const Wide between_n = before_n + steps * at_n;
      const Wide between_d = before_d + steps * at_d;
      const auto error = [&](Wide numerator, Wide denominator) {
        const Wide difference = numerator * d - n * denominator;
        return difference < 0 ? -difference : difference;
      };
      if (error(between_n, between_d) * at_d < error(at_n, at_d) * between_d) {
        at_n = between_n;
        at_d = between_d;
      }
      break;
    }
    before_n = std::exchange(at_n, before_n + whole * at_n);
    before_d = std::exchange(at_d, next_d);
    rest_n = std::exchange(rest_d, rest_n - whole * rest_d);
  }
  return {static_cast<int64_t>(at_n), static_cast<int64_t>(at_d)};
}

/// A token's share of an expert, at most 1, and what is added before a division for the rounding.
struct Share {
  int64_t numerator;
  int64_t denominator;
  int64_t excess;
};

void check_amount(const char* op, const char* argument, int64_t number) {
  nn::check_at_least(op, argument, number, 0);
}

void check_amount(const char* op, const char* argument, const at::Tensor& number) {
  const auto dtype = number.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kLong || dtype == at::kInt,
                    op,
                    ": ",
                    argument,
                    " must be an int or an int64 tensor, got a tensor of ",
                    dtype);
  // On a device the answer would have to be waited for.
  if (number.is_cpu() && number.numel() > 0) {
    check_amount(op, argument, number.min().item<int64_t>());
  }
}

Share checked_share(int64_t num_experts,
                    int64_t top_k,
                    const CapacityFactor& factor,
                    int64_t min_capacity,
                    std::string_view rounding) {
  constexpr auto op = "expert_capacity";
  TORCH_CHECK_VALUE(num_experts >= 1 && num_experts <= kMostExperts,
                    op,
                    ": num_experts must be in [1, ",
                    kMostExperts,
                    "], got ",
                    num_experts);
  check_top_k(op, top_k, num_experts);
  nn::check_at_least(op, "min_capacity", min_capacity, 0);
  const bool up = choose<Rounding>(op, rounding) == Rounding::up;
  // Where a token's share reaches a whole slot every token fits; below, its numerator is smaller
  // than its denominator.
  const int64_t denominator = factor.denominator() * num_experts;
  const auto numerator = std::min<Wide>(Wide{factor.numerator()} * top_k, denominator);
  return {static_cast<int64_t>(numerator), denominator, up ? denominator - 1 : 0};
}

}  // namespace

CapacityFactor::CapacityFactor(double factor, std::string_view op, std::string_view argument) {
  nn::check_not_negative(op, argument, factor);
  std::tie(numerator_, denominator_) = nearest_fraction(factor);
}

int64_t expert_capacity(int64_t num_tokens,
                        int64_t num_experts,
                        int64_t top_k,
                        const CapacityFactor& capacity_factor,
                        int64_t min_capacity,
                        std::string_view rounding) {
  const auto share = checked_share(num_experts, top_k, capacity_factor, min_capacity, rounding);
  check_amount("expert_capacity", "num_tokens", num_tokens);
  const auto slots = (Wide{num_tokens} * share.numerator + share.excess) / share.denominator;
  return std::min(std::max(static_cast<int64_t>(slots), min_capacity), num_tokens);
}

at::Tensor expert_capacity(const at::Tensor& num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           const CapacityFactor& capacity_factor,
                           int64_t min_capacity,
                           std::string_view rounding) {
  const auto share = checked_share(num_experts, top_k, capacity_factor, min_capacity, rounding);
  check_amount("expert_capacity", "num_tokens", num_tokens);
  const auto tokens = num_tokens.to(at::kLong);
  const auto scaled = at::add(at::mul(tokens, share.numerator), share.excess);
  const auto capacity = at::clamp(at::div(scaled, share.denominator, "floor"), min_capacity);
  return at::minimum(capacity, tokens);
}

namespace {

/// The capacity [E] in float64 before it is limited by the number of slots.
template <typename NumSlots>
at::Tensor dynamic_places(const at::Tensor& usage,
                          const NumSlots& num_slots,
                          const CapacityFactor& factor) {
  constexpr auto op = "dynamic_capacity";
  TORCH_CHECK(usage.dim() == 1 && usage.is_floating_point(),
              op,
              ": usage must be [num_experts] and floating, got ",
              usage.scalar_type(),
              " of shape ",
              usage.sizes());
  check_amount(op, "num_slots", num_slots);
  // How far above a whole number, relative to itself, a capacity still counts as it.
  constexpr double kExcess = 1e-6;
  // What three products and a quotient may err by, with a wide margin.
  constexpr double kRounding = 1e-14;
  const int64_t num_experts = usage.size(0);
  const auto most = static_cast<double>(num_experts);
  // A larger factor gives no expert more, and might not fit a float.
  const bool is_small = Wide{factor.numerator()} < Wide{num_experts} * factor.denominator();
  const double share =
      is_small ? static_cast<double>(factor.numerator()) / static_cast<double>(factor.denominator())
               : most;
  const auto load = usage.to(at::kDouble);
  auto relative = load / load.mean();
  relative = at::where(relative.gt(1), relative, 1.0).clamp_max(most);
  const auto places = relative * (share / std::max(most, 1.0)) * num_slots;
  // A whole number that was rounded down by a few units in the last place is that number.
  const auto whole = (places * (1 + kRounding)).floor();
  return at::where((places - whole).gt(kExcess * places), whole + 1, whole);
}

}  // namespace

at::Tensor dynamic_capacity(const at::Tensor& usage,
                            int64_t num_slots,
                            const CapacityFactor& factor) {
  return dynamic_places(usage, num_slots, factor).clamp_max(num_slots).clamp_min(0).to(at::kLong);
}

at::Tensor dynamic_capacity(const at::Tensor& usage,
                            const at::Tensor& num_slots,
                            const CapacityFactor& factor) {
  TORCH_CHECK(num_slots.dim() == 0,
              "dynamic_capacity: num_slots must be an int or a scalar, got shape ",
              num_slots.sizes());
  return at::minimum(dynamic_places(usage, num_slots, factor), num_slots.to(at::kDouble))
      .clamp_min(0)
      .to(at::kLong);
}

}  // namespace torchmoe

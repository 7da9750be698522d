#include "nn/capacity.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>

#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/div.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>

namespace torchmoe {
namespace {

__extension__ typedef __int128 Wide;

/// A fraction of two numbers; a share of the tokens is at most 1.
struct Share {
  int64_t numerator;
  int64_t denominator;
};

/// Most tokens that a count on a device may hold, and the largest denominator it is multiplied
/// with: their product, and with it every intermediate, stays below 2^63.
constexpr int64_t kMostTokens = int64_t{1} << 31;

bool multiply(int64_t& value, int64_t by) {
  return !__builtin_mul_overflow(value, by, &value);
}

Wide greatest_common_divisor(Wide a, Wide b) {
  while (b != 0) {
    a = std::exchange(b, a % b);
  }
  return a;
}

/// The smallest fraction >= a / b (in [0, 1), in lowest terms) whose denominator is at most
/// kMostTokens. No m / n with n <= kMostTokens lies between the two, so ceil(n a / b) is the same
/// for both; a walk down the Stern-Brocot tree.
Share round_up(Wide a, Wide b) {
  if (b <= kMostTokens) {
    return {static_cast<int64_t>(a), static_cast<int64_t>(b)};
  }
  Wide low_n = 0, low_d = 1, high_n = 1, high_d = 1;
  while (low_d + high_d <= kMostTokens) {
    // Distances to a / b, times b and their own denominator. Positive and never equal: a / b
    // itself, or a mediant that hits it, would need the denominator b, which is larger than any
    // here.
    const Wide below = a * low_d - low_n * b;
    const Wide above = high_n * b - a * high_d;
    if (below > above) {
      const Wide steps = std::min(below / above, (kMostTokens - low_d) / high_d);
      low_n += steps * high_n;
      low_d += steps * high_d;
    } else {
      const Wide steps = std::min((above - 1) / below, (kMostTokens - high_d) / low_d);
      high_n += steps * low_n;
      high_d += steps * low_d;
    }
  }
  return {static_cast<int64_t>(high_n), static_cast<int64_t>(high_d)};
}

void check_layer(int64_t num_experts, int64_t top_k, int64_t min_capacity) {
  TORCH_CHECK_VALUE(num_experts >= 1 && num_experts <= kMostTokens,
                    "expert_capacity: num_experts must be in [1, 2^31], got ",
                    num_experts);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= num_experts,
                    "expert_capacity: top_k must be in [1, ",
                    num_experts,
                    "], got ",
                    top_k);
  TORCH_CHECK_VALUE(
      min_capacity >= 0, "expert_capacity: min_capacity must be >= 0, got ", min_capacity);
}

}  // namespace

CapacityFactor::CapacityFactor(double factor, const char* op, const char* argument)
    : numerator_(0), denominator_(1) {
  TORCH_CHECK_VALUE(std::isfinite(factor) && factor >= 0,
                    op,
                    ": ",
                    argument,
                    " must be a finite number >= 0, got ",
                    factor);
  // 1. The shortest decimal that reads back as this double is the one its author wrote: "1.25e+00".
  std::array<char, 32> buffer;
  const auto printed = std::to_chars(buffer.data(),
                                     buffer.data() + buffer.size(),
                                     std::abs(factor),
                                     std::chars_format::scientific);
  const std::string_view text(buffer.data(), printed.ptr - buffer.data());
  const auto e = text.find('e');
  int exponent = 0;
  const char* first = text.data() + e + 1;
  std::from_chars(*first == '+' ? first + 1 : first, text.data() + text.size(), exponent);
  // 2. Its digits, at most 17, are an integer; the decimal point moves into the exponent.
  for (const char digit : text.substr(0, e)) {
    if (digit != '.') {
      numerator_ = 10 * numerator_ + (digit - '0');
    }
  }
  exponent -= e > 1 ? static_cast<int>(e) - 2 : 0;
  // 3. Powers of ten multiply one of the two; a factor of 2 or 5 that the other has is cancelled
  // instead.
  bool fits = true;
  for (; exponent > 0 && fits; --exponent) {
    fits = multiply(numerator_, 10);
  }
  for (; exponent < 0 && fits; ++exponent) {
    for (const int64_t prime : {2, 5}) {
      if (numerator_ % prime == 0) {
        numerator_ /= prime;
      } else {
        fits = fits && multiply(denominator_, prime);
      }
    }
  }
  TORCH_CHECK_VALUE(
      fits, op, ": ", argument, " must be a fraction of two 64-bit integers, got ", factor);
}

int64_t expert_capacity(int64_t num_tokens,
                        int64_t num_experts,
                        int64_t top_k,
                        const CapacityFactor& capacity_factor,
                        int64_t min_capacity) {
  check_layer(num_experts, top_k, min_capacity);
  TORCH_CHECK_VALUE(num_tokens >= 0, "expert_capacity: num_tokens must be >= 0, got ", num_tokens);
  int64_t slots = num_tokens;
  TORCH_CHECK_VALUE(multiply(slots, top_k),
                    "expert_capacity: num_tokens must be below 2^63 / top_k, got ",
                    num_tokens);
  const Wide share = Wide{capacity_factor.numerator()} * slots;
  const Wide parts = Wide{capacity_factor.denominator()} * num_experts;
  const Wide capacity = std::max<Wide>((share + parts - 1) / parts, min_capacity);
  return static_cast<int64_t>(std::min<Wide>(capacity, num_tokens));
}

at::Tensor expert_capacity(const at::Tensor& num_tokens,
                           int64_t num_experts,
                           int64_t top_k,
                           const CapacityFactor& capacity_factor,
                           int64_t min_capacity) {
  check_layer(num_experts, top_k, min_capacity);
  TORCH_CHECK_VALUE(num_tokens.scalar_type() == at::kLong,
                    "expert_capacity: num_tokens must be an int64 tensor, got a tensor of ",
                    num_tokens.scalar_type());
  const Wide a = Wide{capacity_factor.numerator()} * top_k;
  const Wide b = Wide{capacity_factor.denominator()} * num_experts;
  const Wide divisor = greatest_common_divisor(a, b);
  // Once a token's share of an expert reaches a whole slot, every token fits.
  const Share share = a >= b ? Share{1, 1} : round_up(a / divisor, b / divisor);
  const auto scaled = at::add(at::mul(num_tokens, share.numerator), share.denominator - 1);
  const auto capacity = at::clamp(at::div(scaled, share.denominator, "floor"), min_capacity);
  return at::minimum(capacity, num_tokens);
}

}  // namespace torchmoe

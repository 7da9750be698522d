// What the lanes of a product's vectors hold, and how a step of the sums is formed.
//
// A lane of the right operand and one of the left have one term of the sums or two neighbouring
// ones. Packing makes lanes of the stored elements; the tile multiplies them and knows nothing else.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

/// One term a lane, in the type of the sums. Narrower elements are widened.
template <typename Number>
struct Singles {
  using Lane = Number;
  using LeftLane = Number;  // as it is read from a row in place
  using Sum = Number;
  using Lanes = decltype(load(static_cast<const Number*>(nullptr)));
  using Sums = Lanes;
  static constexpr int64_t kTerms = 1;
  static constexpr int64_t kWidth = kWidthOf<Number>;

  /// Whether rows of T are lanes as they lie.
  template <typename T>
  static constexpr bool kInPlace = std::is_same_v<T, Number>;

  static Sums multiply_add(Sums sums, LeftLane left, Lanes right) { return sums + left * right; }

  /// A term of up to kWidth neighbouring rows or columns; null is a row of zeros.
  template <typename T>
  static Lanes across(const T* const (&rows)[kTerms], int64_t first, int64_t count) {
    return rows[0] == nullptr ? Lanes{} : load_up_to(rows[0] + first, count);
  }
};

/// Two bfloat16 terms a lane, the earlier in the lower half.
struct PairsAsLanes {
  using Lane = uint32_t;
  using LeftLane = uint32_t __attribute__((aligned(2), may_alias));
  using Sum = float;
  using Lanes = UnsignedVector;
  using Sums = Vector;
  static constexpr int64_t kTerms = 2;
  static constexpr int64_t kWidth = kWidthOf<float>;

  template <typename T>
  static constexpr bool kInPlace = std::is_same_v<T, BFloat16>;

  static Lanes across(const BFloat16* const (&rows)[kTerms], int64_t first, int64_t count) {
    return half(rows[0], first, count) | half(rows[1], first, count) << 16;
  }

 private:
  static Lanes half(const BFloat16* row, int64_t first, int64_t count) {
    if (row == nullptr) {
      return Lanes{};
    }
    const HalfWidthVector bits = count >= kWidth ? load_bits<HalfWidthVector>(row + first)
                                                 : load_part_bits(row + first, count);
    return __builtin_convertvector(bits, UnsignedVector);
  }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TORCHMOE_HAS_PAIRS
/// For the instruction that multiplies both terms and adds the products to a float32. It takes
/// subnormal numbers for 0.
struct Pairs : PairsAsLanes {
  static Sums multiply_add(Sums sums, LeftLane left, Lanes right) {
#if defined(__AVX512BF16__)
    __m512i both = _mm512_set1_epi32(static_cast<int>(left));
#if defined(__clang__)
    asm("" : "+v"(both));  // clang 16 does not return where it sees that all lanes are equal
#endif
    return _mm512_dpbf16_ps(
        sums, reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(right));
#else
    return vbfdotq_lane_f32(sums,
                            reinterpret_cast<bfloat16x8_t>(right),
                            reinterpret_cast<bfloat16x4_t>(uint32x2_t{left, 0}),
                            0);
#endif
  }
};
#endif

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

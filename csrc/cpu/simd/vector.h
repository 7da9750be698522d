// Vectors in the instruction set that the including source is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/simd/simd.h"

#if defined(__AVX512F__)
#define TORCHMOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TORCHMOE_VECTOR_BYTES 32
#else
#define TORCHMOE_VECTOR_BYTES 16
#endif

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

using Vector = float __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using WideVector = double __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using IntVector = int32_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using UnsignedVector = uint32_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using HalfWidthVector = uint16_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES / 2)));

/// How many elements a vector of float32 has.
constexpr int64_t kWidth = TORCHMOE_VECTOR_BYTES / 4;

/// How many a vector of the sums of T has.
template <typename T>
constexpr int64_t kWidthOf = sizeof(T) == 8 ? kWidth / 2 : kWidth;

/// A stored bfloat16 and float16, by their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

/// Calls body with a pointer of the type that `type` names, whose sums are float32.
template <typename Body>
inline void with_type(Element type, const Body& body) {
#define TORCHMOE_CASE(name, stored, ...) \
  case Element::name:                    \
    return body(static_cast<const stored*>(nullptr));
  switch (type) {
    TORCHMOE_FLOAT32_ELEMENTS(TORCHMOE_CASE)
    case Element::float64:
      __builtin_unreachable();
  }
#undef TORCHMOE_CASE
}

inline Vector broadcast(float value) {
  return value - Vector{};
}

// ---- Loads --------------------------------------------------------------------------------------

/// The bits at `from`.
template <typename V>
inline V load_bits(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vector load(const float* from) {
  return load_bits<Vector>(from);
}

inline WideVector load(const double* from) {
  return load_bits<WideVector>(from);
}

inline Vector load(const BFloat16* from) {
  const auto bits = load_bits<HalfWidthVector>(from);
  return reinterpret_cast<Vector>(__builtin_convertvector(bits, UnsignedVector) << 16);
}

inline Vector load(const Float16* from) {
#if defined(__AVX512F__)
  // The form without a mask warns of an uninitialised operand of gcc's own.
  return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load_bits<__m128i>(from));
#elif defined(__aarch64__)
  return vcvt_f32_f16(load_bits<float16x4_t>(from));
#else
  // The exponent's bias differs by 112: a multiplication by 2^112, which normalises what is
  // subnormal. The largest exponent stands for infinity and NaN.
  constexpr float kTwoTo112 = 5192296858534827628530496329220096.0F;
  const auto bits = __builtin_convertvector(load_bits<HalfWidthVector>(from), UnsignedVector);
  const UnsignedVector size = (bits & 0x7fff) << 13;
  const auto finite = reinterpret_cast<UnsignedVector>(reinterpret_cast<Vector>(size) * kTwoTo112);
  const UnsignedVector magnitude = size >= 0x0f800000 ? size | 0x7f800000 : finite;
  return reinterpret_cast<Vector>(magnitude | (bits & 0x8000) << 16);
#endif
}

/// As many bytes as a vector's elements of T have.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8,
                                WideVector,
                                std::conditional_t<sizeof(T) == 4, Vector, HalfWidthVector>>;

#if defined(__AVX512F__)
inline uint32_t first_lanes(int64_t count) {
  return (uint32_t{1} << count) - 1;
}
#endif

/// The first `count` elements, fewer than a vector has, as they are stored, and zeros after them.
template <typename T>
inline Bits<T> load_part_bits(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    return _mm512_maskz_loadu_pd(first_lanes(count), from);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
  } else {
    return reinterpret_cast<Bits<T>>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
  }
#else
  Bits<T> bits{};
  std::memcpy(&bits, from, count * sizeof(T));
  return bits;
#endif
}

/// Stores the first `count` elements.
template <typename T>
inline void store_part_bits(Bits<T> bits, T* to, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(to, first_lanes(count), bits);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, first_lanes(count), bits);
  } else {
    _mm256_mask_storeu_epi16(to, first_lanes(count), reinterpret_cast<__m256i>(bits));
  }
#else
  std::memcpy(to, &bits, count * sizeof(T));
#endif
}

template <typename T>
inline auto load_up_to(const T* from, int64_t count) {
  if (count >= kWidthOf<T>) {
    return load(from);
  }
  const Bits<T> bits = load_part_bits(from, count);
  return load(reinterpret_cast<const T*>(&bits));
}

// ---- Stores -------------------------------------------------------------------------------------

inline void store(Vector v, float* to) {
  std::memcpy(to, &v, sizeof v);
}

inline void store(WideVector v, double* to) {
  std::memcpy(to, &v, sizeof v);
}

/// The nearest bfloat16, ties to even; a NaN stays one, whatever its payload.
inline HalfWidthVector round_bits(Vector v) {
  const auto bits = reinterpret_cast<UnsignedVector>(v);
  const UnsignedVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UnsignedVector quiet = (bits >> 16) | 0x40;
  const UnsignedVector chosen = v == v ? rounded : quiet;
  return __builtin_convertvector(chosen, HalfWidthVector);
}

inline void store(Vector v, BFloat16* to) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const bfloat16x4_t narrow = vcvt_bf16_f32(v);
#elif defined(__AVX512BF16__)
  auto narrow = reinterpret_cast<HalfWidthVector>(_mm512_cvtneps_pbh(v));
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(v, kSubnormal) != 0) {  // which the instruction takes for 0
    narrow = round_bits(v);
  }
#else
  const auto narrow = round_bits(v);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Vector v, Float16* to) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  const __m128i narrow = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const float16x4_t narrow = vcvt_f16_f32(v);
#else
  // What is subnormal in float16 is rounded by adding 0.5, whose unit in the last place is the
  // smallest float16.
  const auto bits = reinterpret_cast<UnsignedVector>(v);
  const UnsignedVector sign = bits & 0x80000000;
  const UnsignedVector size = bits ^ sign;
  const auto shifted = reinterpret_cast<UnsignedVector>(reinterpret_cast<Vector>(size) + 0.5F);
  const UnsignedVector subnormal = shifted - 0x3f000000;
  const UnsignedVector normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  const UnsignedVector finite = size < 0x38800000 ? subnormal : normal;
  const UnsignedVector infinite = UnsignedVector{} + 0x7c00;
  const UnsignedVector quiet = ((size >> 13) & 0x3ff) | 0x7e00;
  const UnsignedVector chosen = v == v ? (size >= 0x47800000 ? infinite : finite) : quiet;
  const auto narrow = __builtin_convertvector(chosen | sign >> 16, HalfWidthVector);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

template <typename V, typename T>
inline void store_up_to(V v, T* to, int64_t count) {
  if (count >= kWidthOf<T>) {
    return store(v, to);
  }
  Bits<T> bits;
  store(v, reinterpret_cast<T*>(&bits));
  store_part_bits(bits, to, count);
}

// ---- Arithmetic ---------------------------------------------------------------------------------

/// The vector with the element `distance` further on in each place, the first after the last.
template <int64_t distance, int... place>
inline Vector rotate(Vector v, std::integer_sequence<int, place...>) {
  return __builtin_shufflevector(v, v, ((place + distance) % kWidth)...);
}

/// All elements in one number: halves, then halves of these, always in the same order.
template <int64_t half = kWidth / 2, typename Combine>
inline float fold(Vector v, const Combine& combine) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    const Vector other = rotate<half>(v, std::make_integer_sequence<int, kWidth>{});
    return fold<half / 2>(combine(v, other), combine);
  }
}

/// The sum of the elements.
inline float sum(Vector v) {
  return fold(v, [](Vector a, Vector b) { return a + b; });
}

/// exp(x), within 2 units in the last place; 0 below -87.3 (where the result is subnormal or less),
/// inf above 88.7, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) = 1 + r + r^2 q(r) with q fitted to a relative error
/// of 4e-9, and times 2^n, in two halves where it is made of an exponent's bits, since 2^128 has no
/// float.
inline Vector exp(Vector x) {
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;  // few bits: n times it is exact
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Vector low = broadcast(-87.33F);
  const Vector high = broadcast(88.73F);
  const Vector clamped = x < low ? low : (x > high ? high : x);
  const Vector shifted = clamped * kLog2E + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (clamped - n * kLn2High) - n * kLn2Low;
  Vector q = broadcast(1.374882306e-3F);
  q = q * r + 8.369628373e-3F;
  q = q * r + 4.166964626e-2F;
  q = q * r + 1.666651248e-1F;
  q = q * r + 4.999998791e-1F;
  const Vector value = (q * r * r + r) + 1.0F;
#if defined(__AVX512F__)
  const Vector result = _mm512_maskz_scalef_ps(0xffff, value, n);
#else
  const IntVector exponent = __builtin_convertvector(n, IntVector);
  const IntVector half = exponent >> 1;
  const auto power = [](IntVector e) { return reinterpret_cast<Vector>((e + 127) << 23); };
  const Vector result = value * power(half) * power(exponent - half);
#endif
  const Vector zero{};
  const Vector infinite = broadcast(__builtin_inff());
  return x < low ? zero : (x > high ? infinite : (x == x ? result : x));
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

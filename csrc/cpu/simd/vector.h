// Vectors of float32 in the instruction set that the including source is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "cpu/simd/simd.h"

#if defined(__AVX512F__)
#define TORCHMOE_VECTOR_BYTES 64
#else
#define TORCHMOE_VECTOR_BYTES 32
#endif

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

using Vector = float __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using IntVector = int32_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using UnsignedVector = uint32_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES)));
using HalfWidthVector = uint16_t __attribute__((vector_size(TORCHMOE_VECTOR_BYTES / 2)));

/// How many elements a vector has.
constexpr int64_t kWidth = TORCHMOE_VECTOR_BYTES / 4;

/// A stored bfloat16 and float16, by their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr bool is_float32(const float*) {
  return true;
}
template <typename T>
constexpr bool is_float32(const T*) {
  return false;
}

/// Calls body with a pointer of the type that `type` names.
template <typename Body>
inline void with_type(Element type, const Body& body) {
#define TORCHMOE_CASE(name, stored, ...) \
  case Element::name:                    \
    return body(static_cast<const stored*>(nullptr));
  switch (type) { TORCHMOE_ELEMENTS(TORCHMOE_CASE) }
#undef TORCHMOE_CASE
}

inline Vector broadcast(float value) {
  return value - Vector{};
}

// ---- Loads --------------------------------------------------------------------------------------

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vector load(const BFloat16* from) {
  HalfWidthVector bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Vector>(__builtin_convertvector(bits, UnsignedVector) << 16);
}

inline Vector load(const Float16* from) {
#if defined(__AVX512F__)
  // The form without a mask warns of an uninitialised operand of gcc's own.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

/// The first `count` elements, zeros after them; count is below kWidth.
template <typename T>
inline Vector load_part(const T* from, int64_t count) {
  alignas(64) T numbers[kWidth] = {};
  std::memcpy(numbers, from, count * sizeof(T));
  return load(numbers);
}

template <typename T>
inline Vector load_up_to(const T* from, int64_t count) {
  return count >= kWidth ? load(from) : load_part(from, count);
}

// ---- Stores -------------------------------------------------------------------------------------

inline void store(Vector v, float* to) {
  std::memcpy(to, &v, sizeof v);
}

/// Rounds to nearest, ties to even; a NaN stays one, whatever its payload.
inline void store(Vector v, BFloat16* to) {
  const auto bits = reinterpret_cast<UnsignedVector>(v);
  const UnsignedVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UnsignedVector quiet = (bits >> 16) | 0x40;
  const UnsignedVector chosen = v == v ? rounded : quiet;
  const auto narrow = __builtin_convertvector(chosen, HalfWidthVector);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Vector v, Float16* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

template <typename T>
inline void store_up_to(Vector v, T* to, int64_t count) {
  if (count >= kWidth) {
    return store(v, to);
  }
  alignas(64) T numbers[kWidth];
  store(v, numbers);
  std::memcpy(to, numbers, count * sizeof(T));
}

// ---- Arithmetic ---------------------------------------------------------------------------------

/// The sum of the elements, always in the same order.
inline float sum(Vector v) {
  alignas(64) float numbers[kWidth];
  store(v, numbers);
  float total = 0;
  for (const float number : numbers) {
    total += number;
  }
  return total;
}

/// exp(x), within 2 units in the last place; 0 below -87.3 (where the result is subnormal or less),
/// inf above 88.7, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) = 1 + r + r^2 q(r) with q fitted to a relative error
/// of 4e-9, and 2^n added to the exponent's bits in two halves, since 2^128 has no float.
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
  const IntVector exponent = __builtin_convertvector(n, IntVector);
  const IntVector half = exponent >> 1;
  const auto power = [](IntVector e) { return reinterpret_cast<Vector>((e + 127) << 23); };
  const Vector result = value * power(half) * power(exponent - half);
  const Vector zero{};
  const Vector infinite = broadcast(__builtin_inff());
  return x < low ? zero : (x > high ? infinite : (x == x ? result : x));
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

// The softmax of a row of scores.
#include "cpu/simd/softmax.h"

#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

constexpr float kInfinity = __builtin_inff();

template <int... place>
IntVector counted(std::integer_sequence<int, place...>) {
  return IntVector{place...};
}

/// Up to a vector of the values, -inf after them.
Vector load_or_none(const float* from, int64_t count) {
  if (count >= kWidth) {
    return load(from);
  }
  const IntVector places = counted(std::make_integer_sequence<int, kWidth>{});
  return places < static_cast<int>(count) ? load_part_bits(from, count) : broadcast(-kInfinity);
}

/// The larger of each two. A NaN among them is the result, so that it is not lost: nothing is larger
/// than it.
Vector larger(Vector a, Vector b) {
  return a > b ? a : (a == a ? b : a);
}

}  // namespace

void softmax(const SoftmaxCall& call) {
  const Vector first = load_or_none(call.values, call.size);
  Vector tops = first;
  for (int64_t i = kWidth; i < call.size; i += kWidth) {
    tops = larger(load_or_none(call.values + i, call.size - i), tops);
  }
  const float top = fold(tops, larger);
  if (top == -kInfinity) {
    std::memset(call.out, 0, call.size * sizeof(float));
    return;
  }
  Vector sums = exp(first - top);
  if (call.size <= kWidth) {  // what has just been stored in part is slow to load again
    store_up_to(sums / sum(sums), call.out, call.size);
    return;
  }
  store(sums, call.out);
  for (int64_t i = kWidth; i < call.size; i += kWidth) {
    const Vector power = exp(load_or_none(call.values + i, call.size - i) - top);
    sums += power;
    store_up_to(power, call.out + i, call.size - i);
  }
  const float total = sum(sums);
  for (int64_t i = 0; i < call.size; i += kWidth) {
    store_up_to(load_up_to(call.out + i, call.size - i) / total, call.out + i, call.size - i);
  }
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

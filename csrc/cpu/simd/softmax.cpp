// The softmax of a row of scores.
#include "cpu/simd/softmax.h"

#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

constexpr float kInfinity = __builtin_inff();

/// Up to a vector of the values, -inf after them.
Vector load_or_none(const float* from, int64_t count) {
  if (count >= kWidth) {
    return load(from);
  }
  Vector v = broadcast(-kInfinity);
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

/// The largest value, -inf for none; a NaN among them is the result, so that it is not lost: nothing
/// is larger than it.
float largest(const float* values, int64_t size) {
  Vector top = broadcast(-kInfinity);
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vector v = load_or_none(values + i, size - i);
    top = v > top ? v : (v == v ? top : v);
  }
  alignas(64) float numbers[kWidth];
  store(top, numbers);
  float result = -kInfinity;
  for (const float number : numbers) {
    result = number > result || number != number ? number : result;
  }
  return result;
}

}  // namespace

void softmax(const SoftmaxCall& call) {
  const float top = largest(call.values, call.size);
  if (top == -kInfinity) {
    std::memset(call.out, 0, call.size * sizeof(float));
    return;
  }
  Vector sums{};
  for (int64_t i = 0; i < call.size; i += kWidth) {
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

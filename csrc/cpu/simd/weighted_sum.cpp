// Sums of rows that lie anywhere in memory.
#include "cpu/simd/weighted_sum.h"

#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

template <typename T>
void sum_rows(const WeightedSumCall& call) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t c = 0; c < call.width; c += kWidth) {
    const int64_t count = call.width - c;
    if (c % kLine == 0) {
      for (int64_t i = 0; i < call.num_next; ++i) {
        __builtin_prefetch(call.next[i] + c);
      }
    }
    Vector total{};
    for (int64_t i = 0; i < call.count; ++i) {
      total += call.weights[i] * load_up_to(call.rows[i] + c, count);
    }
    store_up_to(total, static_cast<T*>(call.out.data) + c, count);
  }
}

}  // namespace

void weighted_sum(const WeightedSumCall& call) {
  with_type(call.out.type, [&]<typename T>(const T*) { sum_rows<T>(call); });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

// One instruction set's entry in the table.
#include "cpu/simd/activation.h"
#include "cpu/simd/product.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/vector.h"
#include "cpu/simd/weighted_sum.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

void store_numbers(const float* from, MutableNumbers to, int64_t count) {
  with_type(to.type, [&]<typename T>(const T*) {
    for (int64_t i = 0; i < count; i += kWidth) {
      store_up_to(load_up_to(from + i, count - i), static_cast<T*>(to.data) + i, count - i);
    }
  });
}

}  // namespace

const Simd* table() {
  static const Simd functions{&product_scratch,
                              &product,
                              &activate,
                              &activate_backward,
                              &softmax,
                              &weighted_sum,
                              &store_numbers};
  return &functions;
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

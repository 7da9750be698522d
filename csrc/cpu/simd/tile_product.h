// The product on a processor's tile registers, where TORCHMOE_TILES names the header that has them.
#pragma once

#include "cpu/simd/simd.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

#if defined(TORCHMOE_TILES)
/// Whether the operands are such that tiles multiply.
inline bool is_on_tiles(const ProductCall& call) {
  return call.left.numbers.type == Element::bfloat16 &&
         call.right.numbers.type == Element::bfloat16;
}

/// As product_scratch() and product().
int64_t tile_product_scratch(const ProductCall& call);
void tile_product(const ProductCall& call);
#endif

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

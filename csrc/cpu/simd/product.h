#pragma once

#include "cpu/simd/simd.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

/// How many bytes of scratch product() uses.
int64_t product_scratch(const ProductCall& call);
void product(const ProductCall& call);

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

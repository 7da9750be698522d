#pragma once

#include "cpu/simd/simd.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

void softmax(const SoftmaxCall& call);

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

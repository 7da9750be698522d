#pragma once

#include "cpu/simd/simd.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

void weighted_sum(const WeightedSumCall& call);

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

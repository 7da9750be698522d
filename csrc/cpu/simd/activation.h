#pragma once

#include "cpu/simd/simd.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

void activate(const ActivateCall& call);
void activate_backward(const ActivateBackwardCall& call);

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET

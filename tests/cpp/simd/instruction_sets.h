// The instruction sets whose products of bfloat16 operands are tested.
#pragma once

#include <vector>

#include "cpu/simd/instruction_sets.h"

namespace torchmoe::test {

/// Those that the processor has, and those whose tile registers are emulated.
std::vector<cpu::InstructionSet> sets_with_tiles();

}  // namespace torchmoe::test

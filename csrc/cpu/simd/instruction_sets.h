// The instruction sets that this room is compiled for.
#pragma once

#include <vector>

#include "cpu/simd/simd.h"

namespace torchmoe::cpu {

struct InstructionSet {
  const char* name;
  const Simd* functions;
};

/// Those that this processor has; each has what the ones before it have.
std::vector<InstructionSet> instruction_sets();

}  // namespace torchmoe::cpu

// Which instruction set is chosen.
#include "cpu/simd/simd.h"

#include "cpu/simd/instruction_sets.h"
#include "support.h"

TEST_CASE("simd: the chosen instruction set is one that the processor has", "[cpu]") {
  bool is_known = false;
  for (const auto& [name, functions] : torchmoe::cpu::instruction_sets()) {
    is_known = is_known || &torchmoe::cpu::simd() == functions;
  }
  CHECK(is_known);
}

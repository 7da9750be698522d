#include "simd/instruction_sets.h"

#include <string_view>

namespace torchmoe::cpu {
namespace emulated_tiles {
const Simd* table();
}
#if defined(__x86_64__)
namespace emulated_tiles_avx512 {
const Simd* table();
}
#endif
}  // namespace torchmoe::cpu

namespace torchmoe::test {

std::vector<cpu::InstructionSet> sets_with_tiles() {
  std::vector<cpu::InstructionSet> sets = cpu::instruction_sets();
#if defined(__x86_64__)
  // The set that has the registers has AVX-512 too.
  for (const auto& [name, functions] : cpu::instruction_sets()) {
    if (name == std::string_view("avx512")) {
      sets.push_back({"emulated_tiles_avx512", cpu::emulated_tiles_avx512::table()});
    }
  }
#endif
  sets.push_back({"emulated_tiles", cpu::emulated_tiles::table()});
  return sets;
}

}  // namespace torchmoe::test

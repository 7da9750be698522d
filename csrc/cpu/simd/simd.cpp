#include "cpu/simd/simd.h"

#include <string>

#include <ATen/Version.h>

#include "cpu/simd/instruction_sets.h"

// X(name, whether this processor has it): each has what the ones before it have.
#if defined(__x86_64__)
#define TORCHMOE_INSTRUCTION_SETS(X)                                              \
  X(baseline, true)                                                               \
  X(avx2,                                                                         \
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&            \
        __builtin_cpu_supports("f16c"))                                           \
  X(avx512,                                                                       \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&    \
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) \
  X(avx512_bf16, __builtin_cpu_supports("avx512bf16"))
#else
#define TORCHMOE_INSTRUCTION_SETS(X) X(baseline, true)
#endif

namespace torchmoe::cpu {

#define TORCHMOE_TABLE(name, ...) \
  namespace name {                \
  const Simd* table();            \
  }
TORCHMOE_INSTRUCTION_SETS(TORCHMOE_TABLE)
#undef TORCHMOE_TABLE

std::vector<InstructionSet> instruction_sets() {
  struct Compiled {
    InstructionSet set;
    bool is_there;
  };
#define TORCHMOE_COMPILED(name, is_there) Compiled{{#name, name::table()}, (is_there) != 0},
  const Compiled all[] = {TORCHMOE_INSTRUCTION_SETS(TORCHMOE_COMPILED)};
#undef TORCHMOE_COMPILED
  std::vector<InstructionSet> sets;
  for (const auto& [set, is_there] : all) {
    if (!is_there) {
      break;
    }
    sets.push_back(set);
  }
  return sets;
}

namespace {

/// Whether torch's own kernels may use the instruction set: ATEN_CPU_CAPABILITY limits them, and
/// this room with them.
bool is_allowed(const std::string& name) {
  const auto capability = at::get_cpu_capability();
  const bool is_limited = capability == "AVX2" || capability == "DEFAULT" || capability == "NO AVX";
  return !is_limited || name == "baseline" || (capability == "AVX2" && name == "avx2");
}

}  // namespace

const Simd& simd() {
  static const Simd& chosen = []() -> const Simd& {
    const Simd* last = nullptr;
    for (const auto& [name, functions] : instruction_sets()) {
      if (is_allowed(name)) {
        last = functions;
      }
    }
    return *last;
  }();
  return chosen;
}

}  // namespace torchmoe::cpu

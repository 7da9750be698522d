#include "cpu/simd/instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__linux__)
#include <unistd.h>

#include <sys/auxv.h>
#include <sys/syscall.h>
#endif

// X(name, whether this processor has it): each has what the ones before it have. On aarch64 the
// baseline has NEON.
#if defined(__x86_64__)
#define TORCHMOE_INSTRUCTION_SETS(X)                                                     \
  X(baseline, true)                                                                      \
  X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) \
  X(avx512,                                                                              \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&           \
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))        \
  X(avx512_bf16, __builtin_cpu_supports("avx512bf16"))                                   \
  X(amx, has_amx())
#elif defined(__aarch64__)
#define TORCHMOE_INSTRUCTION_SETS(X) \
  X(baseline, true)                  \
  X(neon_bf16, has_neon_bf16())
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

namespace {

#if defined(__x86_64__)
// What __builtin_cpu_supports does not know in every compiler.
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// What cpuid says; zeros where there is no such leaf.
Leaf leaf(unsigned number) {
  Leaf leaf;
  __get_cpuid_count(number, 0, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx);
  return leaf;
}

/// Conversions of float16.
bool has_f16c() {
  return (leaf(1).ecx & 1U << 29) != 0;
}

/// Tiles of bfloat16, whose registers Linux gives to a process that asks for them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kHasXgetbv = 1U << 27;
  constexpr unsigned kBFloat16 = 1U << 22, kTiles = 1U << 24;
  constexpr unsigned kTileState = 3U << 17;  // the system saves the registers
  constexpr long kAskForState = 0x1023, kTileData = 18;
  const unsigned has = leaf(7).edx;
  if ((leaf(1).ecx & kHasXgetbv) == 0 || (has & kBFloat16) == 0 || (has & kTiles) == 0) {
    return false;
  }
  unsigned state = 0, high = 0;
  asm("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  return (state & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBfloat16 = 1UL << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBfloat16) != 0;
#else
  return false;
#endif
}
#endif

}  // namespace

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

}  // namespace torchmoe::cpu

#include "cpu/simd/simd.h"

#include <cstdlib>
#include <string>

#include <ATen/Version.h>

#include "cpu/simd/instruction_sets.h"

namespace torchmoe::cpu {

namespace {

/// Whether torch's own kernels may use the instruction set: ATEN_CPU_CAPABILITY limits them, and
/// this room with them.
bool is_allowed(const std::string& name) {
#if defined(__aarch64__)
  // The lowest capability is that of most of these processors, whose bfloat16 instructions torch's
  // kernels use with it: only who asks for the lowest goes without.
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  return name == "baseline" || asked == nullptr || std::string(asked) != "default";
#else
  const auto capability = at::get_cpu_capability();
  const bool is_limited = capability == "AVX2" || capability == "DEFAULT" || capability == "NO AVX";
  return !is_limited || name == "baseline" || (capability == "AVX2" && name == "avx2");
#endif
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

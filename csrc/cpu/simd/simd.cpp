#include "cpu/simd/simd.h"

#include <ATen/Version.h>

namespace torchmoe::cpu {

#ifdef TORCHMOE_SIMD
namespace avx2 {
const Simd* table();
}
namespace avx512 {
const Simd* table();
}
#endif

const Simd* simd() {
  static const Simd* chosen = []() -> const Simd* {
#ifdef TORCHMOE_SIMD
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return avx512::table();
    }
    if (capability == "AVX2") {
      return avx2::table();
    }
#endif
    return nullptr;
  }();
  return chosen;
}

}  // namespace torchmoe::cpu

#include "backend.h"

#include <cuda_runtime_api.h>

namespace torchmoe {

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

void register_missing_backends(torch::Library& /*library*/) {}

}  // namespace torchmoe

// The type that launchers take a stream as.
#pragma once

#include <cuda_runtime_api.h>

namespace torchmoe::cuda {

using Stream = cudaStream_t;

}  // namespace torchmoe::cuda

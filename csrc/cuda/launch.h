// The one place where a kernel is launched. Kernels and their launchers are .cu files that know no
// tensor: pointers, sizes and a stream only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include <c10/cuda/CUDAException.h>

#include "cuda/stream.h"

namespace torchmoe::cuda {

// What a launch may ask for on every supported device; more shared memory must be allowed to a
// kernel first.
constexpr int64_t kMaxBlocks = 2147483647;
constexpr std::size_t kSharedBytesAtHand = 48 * 1024;

/// A block's dynamic shared memory, of the size given to launch, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

/// Runs `kernel` on `blocks` (0: nothing to do) of `threads` each and checks the launch.
template <typename... Parameters, typename... Arguments>
void launch(Stream stream,
            int64_t blocks,
            int threads,
            std::size_t shared_bytes,
            void (*kernel)(Parameters...),
            Arguments... arguments) {
  TORCH_CHECK(blocks <= kMaxBlocks, "torchmoe: a launch of ", blocks, " blocks is too large");
  if (blocks == 0) {
    return;
  }
  if (shared_bytes > kSharedBytesAtHand) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(
      static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace torchmoe::cuda

// Marks the scalar formulas that the CPU and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define TORCHMOE_HOST_DEVICE __host__ __device__
#else
#define TORCHMOE_HOST_DEVICE
#endif

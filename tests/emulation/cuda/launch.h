// In place of csrc/cuda/launch.h: the names of CUDA that kernels use, on the host. A warp operation
// is written as what all lanes see together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <c10/util/Exception.h>

#include "cuda/stream.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define threadIdx (::torchmoe::emulation::place().thread)
#define blockIdx (::torchmoe::emulation::place().block)
#define blockDim (::torchmoe::emulation::place().block_size)
#define gridDim (::torchmoe::emulation::place().grid_size)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() {
  torchmoe::emulation::barrier();
}

namespace torchmoe::emulation {

/// A warp operation whose operand has a `result`; `compute` fills it in for every lane.
template <typename Operand>
Operand together(unsigned mask, Operand operand, Collective compute) {
  collective(mask, compute, &operand);
  return operand;
}

template <typename T>
struct Shuffle {
  T value;
  int source;
  T result;
};

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  const auto compute = [](Lanes lanes) {
    for (void* lane : lanes) {
      if (lane != nullptr) {
        auto* mine = static_cast<Shuffle<T>*>(lane);
        const auto* other = static_cast<const Shuffle<T>*>(lanes[mine->source]);
        check(other != nullptr, "a shuffle reads a lane that takes no part");
        mine->result = other->value;
      }
    }
  };
  return together(mask, Shuffle<T>{value, source, T()}, compute).result;
}

inline int lane() {
  return static_cast<int>(place().thread.x) % kWarpSize;
}

struct Ballot {
  bool predicate;
  unsigned result;
};

}  // namespace torchmoe::emulation

inline void __syncwarp(unsigned mask = 0xffffffffU) {
  torchmoe::emulation::together(mask, 0, [](torchmoe::emulation::Lanes /*lanes*/) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return torchmoe::emulation::shuffle(mask, value, source % torchmoe::emulation::kWarpSize);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return torchmoe::emulation::shuffle(mask, value, torchmoe::emulation::lane() ^ bits);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = torchmoe::emulation::lane();
  return torchmoe::emulation::shuffle(mask, value, lane < distance ? lane : lane - distance);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = torchmoe::emulation::lane();
  const int source = lane + distance;
  return torchmoe::emulation::shuffle(
      mask, value, source < torchmoe::emulation::kWarpSize ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  using torchmoe::emulation::Ballot;
  const auto compute = [](torchmoe::emulation::Lanes lanes) {
    unsigned bits = 0;
    for (int i = 0; i < torchmoe::emulation::kWarpSize; ++i) {
      if (lanes[i] != nullptr && static_cast<Ballot*>(lanes[i])->predicate) {
        bits |= 1U << i;
      }
    }
    for (void* lane : lanes) {
      if (lane != nullptr) {
        static_cast<Ballot*>(lane)->result = bits;
      }
    }
  };
  return torchmoe::emulation::together(mask, Ballot{predicate, 0}, compute).result;
}

inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}

namespace torchmoe::emulation {

template <typename T>
struct Match {
  T value;
  unsigned result;
};

}  // namespace torchmoe::emulation

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  using Match = torchmoe::emulation::Match<T>;
  const auto compute = [](torchmoe::emulation::Lanes lanes) {
    for (void* lane : lanes) {
      for (int i = 0; lane != nullptr && i < torchmoe::emulation::kWarpSize; ++i) {
        auto* mine = static_cast<Match*>(lane);
        if (lanes[i] != nullptr && static_cast<Match*>(lanes[i])->value == mine->value) {
          mine->result |= 1U << i;
        }
      }
    }
  };
  return torchmoe::emulation::together(mask, Match{value, 0}, compute).result;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

namespace torchmoe::cuda {

inline unsigned char* shared_memory() {
  return emulation::shared_memory();
}

template <typename... Parameters, typename... Arguments>
void launch(Stream /*stream*/,
            int64_t blocks,
            int threads,
            std::size_t shared_bytes,
            void (*kernel)(Parameters...),
            Arguments... arguments) {
  emulation::run_grid(
      blocks, threads, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace torchmoe::cuda

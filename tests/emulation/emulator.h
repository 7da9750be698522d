// Runs kernels on the host, thread for thread: every thread of a block is a fiber, and blocks run
// one after another. Barriers and warp operations are where fibers change, so that a missing
// barrier, a thread that skips one and a wrong index show as they would on a GPU.
//
// A warp runs as far ahead of the others as barriers let it, and every second launch takes warps and
// lanes in descending order: a result that depends on the order (a race) differs or is wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace torchmoe::emulation {

struct Index {
  unsigned x = 0;
};

/// Where the running thread is.
struct Place {
  Index thread;
  Index block;
  Index block_size;
  Index grid_size;
};

const Place& place();

/// Runs body once for each thread of each block. Throws std::runtime_error where the threads wait
/// for each other in vain, and for the misuse that check() finds.
void run_grid(int64_t blocks,
              int threads,
              std::size_t shared_bytes,
              const std::function<void()>& body);

unsigned char* shared_memory();

/// __syncthreads
void barrier();

constexpr int kWarpSize = 32;

/// Operands of the lanes of a warp, null for those outside the mask.
using Lanes = void* const (&)[kWarpSize];
using Collective = void (*)(Lanes);

/// Waits for the lanes of `mask`; the last one runs `compute` over what each has given.
void collective(unsigned mask, Collective compute, void* operand);

/// Ends the launch with `message` where `condition` does not hold.
void check(bool condition, const char* message);

}  // namespace torchmoe::emulation

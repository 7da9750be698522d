// In place of csrc/cuda/stream.h: the host has one stream, and launches are over when they return.
#pragma once

namespace torchmoe::cuda {

struct Stream {};

}  // namespace torchmoe::cuda

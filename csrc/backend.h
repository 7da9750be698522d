// What a library's variants (with and without CUDA) do in their own way. Each has its own backend.cpp.
#pragma once

#include <torch/library.h>

namespace torchmoe {

/// Called once, when every op is defined: in a library without CUDA, ops refuse CUDA tensors in one
/// readable sentence.
void register_missing_backends(torch::Library& library);

}  // namespace torchmoe

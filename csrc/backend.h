// What a library's variants (with and without CUDA) say of themselves. Each has its own backend.cpp.
#pragma once

#include <string>

#include <torch/library.h>

namespace torchmoe {

/// The CUDA version that the kernels were built with, for example "13.0"; "none" without them.
std::string cuda_version();

/// Called once, when every op is defined: in a library without CUDA, ops refuse CUDA tensors in one
/// readable sentence.
void register_missing_backends(torch::Library& library);

}  // namespace torchmoe

// The safetensors format: 8 bytes with the length of a JSON header, the header, the tensors' bytes.
// https://github.com/huggingface/safetensors#format
#pragma once

#include <istream>
#include <ostream>
#include <string_view>

#include <c10/core/ScalarType.h>

#include "state_dict.h"

namespace torchmoe {

/// The format's name of a dtype, "F32" for example; empty for one that state dicts do not hold.
std::string_view safetensors_dtype(at::ScalarType dtype);

/// c10::ValueError with the bare problem where the bytes are not of this format.
StateDict read_safetensors(std::istream& stream);

/// `state`: dense tensors on the CPU of dtypes that have a name above.
void write_safetensors(const StateDict& state, std::ostream& stream);

}  // namespace torchmoe

// The format of Python's torch.save: a zip of the pickle data.pkl and, as data/N, the bytes of
// every storage.
#pragma once

#include <istream>
#include <ostream>

#include "state_dict.h"

namespace torchmoe {

/// c10::ValueError with the bare problem where the file holds anything but a dict of tensors; other
/// exceptions, torch's, where its zip is damaged.
StateDict read_torch_file(std::istream& stream);

/// `state`: dense tensors on the CPU.
void write_torch_file(const StateDict& state, std::ostream& stream);

}  // namespace torchmoe

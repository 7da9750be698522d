// Python's pickle of a dict of tensors.
#pragma once

#include <functional>
#include <string_view>

#include <c10/core/Storage.h>

#include "state_dict.h"

namespace torchmoe {

/// Runs the program of a pickle as far as dicts of tensors need it, protocols 2 to 5. The names of
/// classes and functions in it are compared with those known here; nothing is looked up or called.
///
/// `storage` gives the bytes of a key. c10::ValueError with the bare problem where the program
/// makes anything else.
StateDict unpickle_state_dict(std::string_view program,
                              const std::function<at::Storage(std::string_view)>& storage);

}  // namespace torchmoe

// The tensors of a module by name, and files of them that C++ and Python exchange.
#pragma once

#include <string>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/ordered_dict.h>

namespace torchmoe {

/// Tensors by dotted name, such as "experts.down_proj", in order.
using StateDict = torch::OrderedDict<std::string, at::Tensor>;

/// The parameters and buffers of `module`, under the names that Python's module.state_dict() gives
/// them: a module's parameters, its buffers, then its children. The tensors are detached and share
/// the module's memory; undefined ones are left out.
StateDict state_dict(const torch::nn::Module& module);

/// Copies the values of `state` into the parameters and buffers of `module`, in place, converted to
/// their dtype and device.
///
/// Names and shapes must be those of state_dict(module). Otherwise c10::ValueError names every
/// difference, and nothing is written.
void load_state_dict(torch::nn::Module& module, const StateDict& state);

/// Writes `state` to a file: *.safetensors in that format, any other name in the format that
/// Python's torch.load(path) reads as a dict, also with weights_only.
///
/// Tensors are dense, of any shape and device, and float64, float32, float16, bfloat16, int64,
/// int32, int16, int8, uint8 or bool; names are UTF-8. Both formats keep names and bits.
/// torch.load's also keeps strides and which tensors share memory, and holds the whole storage of a
/// view; safetensors' holds each tensor contiguous. The device is not kept: every file can be read
/// without a GPU.
///
/// Throws c10::ValueError for other tensors and names, and if the file cannot be created. The file
/// gets its name only when it is complete: if writing fails, an existing file is kept.
void write_state_dict(const StateDict& state, const std::string& path);

/// The tensors of a file of write_state_dict, of Python's torch.save(module.state_dict(), path) or
/// torch.save of another dict of tensors, or of safetensors. Its first bytes decide the format, not
/// its name. The order is the file's; tensors are on the CPU and require no grad.
///
/// Nothing in the file is executed. c10::ValueError says what is wrong with a file that cannot be
/// read, holds anything but tensors of the dtypes above, or was written by torch before 1.6.
StateDict read_state_dict(const std::string& path);

}  // namespace torchmoe

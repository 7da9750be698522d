#include "serialize/state_dict.h"

#include <array>
#include <bit>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <random>
#include <string_view>
#include <system_error>
#include <utility>

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "serialize/safetensors.h"
#include "serialize/torch_file.h"

namespace torchmoe {

// Both formats are little-endian, and bytes are copied as they are.
static_assert(std::endian::native == std::endian::little);

namespace {

void collect(const torch::nn::Module& module, const std::string& prefix, StateDict& state) {
  for (const auto& tensors : {module.named_parameters(false), module.named_buffers(false)}) {
    for (const auto& item : tensors) {
      state.insert(prefix + item.key(), item.value().detach());
    }
  }
  for (const auto& child : module.named_children()) {
    collect(*child.value(), prefix + child.key() + ".", state);
  }
}

// What can be copied to another tensor: it has memory, one element for every entry.
bool is_dense(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta() &&
         !tensor.is_quantized();
}

std::string description(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return "an undefined tensor";
  }
  return c10::str("a ", tensor.toString(), " of shape ", tensor.sizes());
}

// Python's strings are Unicode: a name of other bytes would make a file that it cannot read.
bool is_utf8(std::string_view text) {
  // The least code point that needs so many bytes after the first.
  constexpr std::array<uint32_t, 4> least = {0, 0x80, 0x800, 0x10000};
  for (size_t i = 0; i < text.size();) {
    const auto first = static_cast<uint8_t>(text[i++]);
    const auto ones = static_cast<size_t>(std::countl_one(first));
    if (ones == 1 || ones > 4) {
      return false;
    }
    const size_t more = ones == 0 ? 0 : ones - 1;
    uint32_t code = first & (0xFFU >> (ones + 1));
    for (size_t j = 0; j < more; ++j, ++i) {
      if (i == text.size() || (static_cast<uint8_t>(text[i]) & 0xC0U) != 0x80) {
        return false;
      }
      code = code << 6U | (static_cast<uint8_t>(text[i]) & 0x3FU);
    }
    if (code < least[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      return false;
    }
  }
  return true;
}

// The tensors as the files hold them.
StateDict prepare(const StateDict& state, bool safetensors) {
  StateDict prepared;
  for (const auto& item : state) {
    const auto& name = item.key();
    const auto& tensor = item.value();
    TORCH_CHECK_VALUE(
        is_utf8(name), "write_state_dict: state must have names in UTF-8, got \"", name, "\"");
    TORCH_CHECK_VALUE(
        !safetensors || name != "__metadata__",
        "write_state_dict: state must not use a name of the format's own, got \"__metadata__\"");
    TORCH_CHECK_VALUE(
        is_dense(tensor) && !safetensors_dtype(tensor.scalar_type()).empty(),
        "write_state_dict: state must hold dense tensors of floats, ints or bools, got \"",
        name,
        "\", ",
        description(tensor));
    prepared.insert(name, tensor.detach().cpu().resolve_neg());
  }
  return prepared;
}

std::string temporary_sibling(const std::string& path) {
  std::random_device random;
  return c10::str(path, ".tmp-", random());
}

void write_file(const StateDict& state, bool safetensors, const std::string& path) {
  std::ofstream stream(path, std::ios::binary);
  TORCH_CHECK_VALUE(
      stream, "write_state_dict: path must be in a writable folder, got \"", path, "\"");
  (safetensors ? write_safetensors : write_torch_file)(state, stream);
  stream.close();
  TORCH_CHECK(stream, "write_state_dict: path must have room for the file, got \"", path, "\"");
}

// torch's messages begin with the place in its sources, and go on with advice.
std::string in_one_sentence(const std::string& message) {
  const auto place = message.find("] . ");
  const auto text = place == std::string::npos ? message : message.substr(place + 4);
  return "torch cannot read it: " + text.substr(0, text.find('\n'));
}

}  // namespace

StateDict state_dict(const torch::nn::Module& module) {
  StateDict state;
  collect(module, "", state);
  return state;
}

void load_state_dict(torch::nn::Module& module, const StateDict& state) {
  const StateDict own = state_dict(module);
  std::string problems;
  const auto report = [&](const std::string& problem) {
    problems += (problems.empty() ? "" : ", ") + problem;
  };
  for (const auto& item : own) {
    const auto* value = state.find(item.key());
    if (value == nullptr) {
      report(c10::str("no \"", item.key(), "\""));
    } else if (!is_dense(*value)) {
      report(c10::str("\"", item.key(), "\" as ", description(*value)));
    } else if (value->sizes() != item.value().sizes()) {
      report(c10::str(
          "\"", item.key(), "\" of shape ", value->sizes(), " for ", item.value().sizes()));
    }
  }
  for (const auto& item : state) {
    if (!own.contains(item.key())) {
      report(c10::str("unexpected \"", item.key(), "\""));
    }
  }
  TORCH_CHECK_VALUE(problems.empty(),
                    "load_state_dict: state must have the names and shapes of the module, got ",
                    problems);
  const at::NoGradGuard no_grad;
  for (const auto& item : own) {
    item.value().copy_(state[item.key()]);
  }
}

void write_state_dict(const StateDict& state, const std::string& path) {
  const bool safetensors = path.ends_with(".safetensors");
  const auto prepared = prepare(state, safetensors);
  const auto temporary = temporary_sibling(path);
  std::error_code error;
  try {
    write_file(prepared, safetensors, temporary);
    std::filesystem::rename(temporary, path, error);
    TORCH_CHECK_VALUE(!error, "write_state_dict: path must be that of a file, got \"", path, "\"");
  } catch (...) {
    std::filesystem::remove(temporary, error);
    throw;
  }
}

StateDict read_state_dict(const std::string& path) {
  std::error_code error;
  std::ifstream stream(path, std::ios::binary);
  TORCH_CHECK_VALUE(stream && std::filesystem::is_regular_file(path, error),
                    "read_state_dict: path must be a readable file, got \"",
                    path,
                    "\"");
  std::array<char, 4> magic{};
  stream.read(magic.data(), magic.size());
  stream.clear();
  stream.seekg(0);
  const std::string_view begin(magic.data(), magic.size());
  std::string problem;
  try {
    TORCH_CHECK_VALUE(begin != "\x80\x02\x8a\x0a", "torch before 1.6 wrote it, which used no zip");
    auto state = begin == "PK\x03\x04" ? read_torch_file(stream) : read_safetensors(stream);
    for (const auto& item : state) {
      TORCH_CHECK_VALUE(is_utf8(item.key()), "a name in it is not UTF-8");
    }
    return state;
  } catch (const c10::ValueError& e) {
    problem = e.msg();
  } catch (const c10::Error& e) {
    problem = in_one_sentence(e.msg());
  } catch (const std::exception& e) {
    problem = in_one_sentence(e.what());
  }
  C10_THROW_ERROR(ValueError,
                  c10::str("read_state_dict: path must be an intact file of a state dict, got \"",
                           path,
                           "\": ",
                           problem));
}

}  // namespace torchmoe

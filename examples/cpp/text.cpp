#include "text.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include <torch/types.h>

#include "errors.h"

namespace {

std::string read_file(const std::string& name) {
  const auto refuse = [&name](const char* reason) -> InputError {
    return InputError("FILE must be a file that can be read, got " + name + " (" + reason + ")");
  };
  std::error_code unknown;
  if (std::filesystem::is_directory(name, unknown)) {
    throw refuse("a folder");
  }
  errno = 0;
  std::ifstream file(name, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) {
    throw refuse(std::strerror(errno));
  }
  return bytes;
}

at::Tensor as_tensor(const std::string& bytes) {
  return torch::tensor(
      at::ArrayRef<uint8_t>(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()),
      torch::kByte);
}

/// `length` bytes from each of the starts [W], int64 [W, length].
at::Tensor windows_at(const at::Tensor& bytes, const at::Tensor& starts, int64_t length) {
  const auto positions = starts.unsqueeze(1) + torch::arange(length);  // [W, length]
  return bytes.index({positions}).to(torch::kLong);
}

}  // namespace

Text Text::read(const std::vector<std::string>& files, int64_t context) {
  std::string whole, train, validation;
  for (const auto& name : files) {
    whole += read_file(name);
  }
  const auto size = static_cast<int64_t>(whole.size());
  for (int64_t start = 0; start < size; start += kBlockBytes) {
    const bool is_validation = start / kBlockBytes % kValidationBlock == kValidationBlock - 1;
    (is_validation ? validation : train).append(whole, start, kBlockBytes);
  }
  // Nine blocks come before the first for validation, so that this one decides.
  const int64_t window = context + 1;
  if (static_cast<int64_t>(validation.size()) < window) {
    const int64_t blocks = (window + kBlockBytes - 1) / kBlockBytes;  // for validation
    const int64_t needed = blocks * (kValidationBlock - 1) * kBlockBytes + window;
    throw InputError("the text must have at least " + std::to_string(needed) +
                     " bytes with --context " + std::to_string(context) + ", got " +
                     std::to_string(size));
  }
  return {as_tensor(train), as_tensor(validation), hash_of(whole)};
}

at::Tensor Text::draw(int64_t batch, int64_t context) const {
  const auto starts = torch::randint(0, train.size(0) - context, {batch}, torch::kLong);  // [batch]
  return windows_at(train, starts, context + 1);
}

at::Tensor Text::validation_windows(int64_t most, int64_t context) const {
  const int64_t size = validation.size(0);
  const int64_t count = std::min(most, size / (context + 1));
  const auto starts = torch::arange(count) * (size / count);  // [W]
  return windows_at(validation, starts, context + 1);
}

int64_t hash_of(const std::string& bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<uint8_t>(byte)) * 0x100000001b3;
  }
  return static_cast<int64_t>(hash);
}

// The text: bytes of files, split into a part to train on and a part to validate with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

/// The files' bytes, one after the other, are cut into blocks of this size, the last one shorter.
constexpr int64_t kBlockBytes = 4096;
/// Blocks 9, 19, 29, ... are for validation, counted from 0. The rest, joined, is for training.
constexpr int64_t kValidationBlock = 10;

struct Text {
  at::Tensor train;       // uint8 [N]
  at::Tensor validation;  // uint8 [M]
  int64_t hash;           // of every byte and of their order

  /// \throws InputError where a file cannot be read or a part is too short for one window.
  static Text read(const std::vector<std::string>& files, int64_t context);

  /// The windows of one step, int64 [batch, context + 1], from torch's default generator.
  at::Tensor draw(int64_t batch, int64_t context) const;

  /// The windows of every validation, int64 [W, context + 1]: at most `most`, evenly spread over
  /// the validation bytes, none overlapping another.
  at::Tensor validation_windows(int64_t most, int64_t context) const;
};

/// FNV-1a: notices an accident, and does not withstand an attack.
int64_t hash_of(const std::string& bytes);

// The checks that the modules and their options share. A message reads `Class: argument must ...,
// got ...`.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <typeinfo>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace torchmoe::nn {

/// A number as Python shows it: "0.1", "2.0", "1e-05", "nan".
std::string shown(double number);

/// The entries as "(1, 2, 0)".
std::string listed(const std::vector<int64_t>& entries);

/// A class as its user wrote it, without namespaces and Impl.
std::string class_name(const std::type_info& type);

inline void check_at_least(std::string_view owner,
                           std::string_view argument,
                           int64_t value,
                           int64_t least) {
  TORCH_CHECK_VALUE(value >= least, owner, ": ", argument, " must be >= ", least, ", got ", value);
}

inline void check_not_negative(std::string_view owner, std::string_view argument, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0,
                    owner,
                    ": ",
                    argument,
                    " must be a finite number >= 0, got ",
                    shown(value));
}

/// The entries of a backup table: another expert for each of two or more.
void check_backup_table(std::string_view owner, const std::vector<int64_t>& backup);

/// Whether a parameter is to learn that takes the place of this one, which a copy shares with the
/// module that it is made of; a new module's is undefined yet.
inline bool learns(const at::Tensor& parameter) {
  return !parameter.defined() || parameter.requires_grad();
}

/// What a part of a layer has returned: floating, of a shape that `layout` names, on a device.
void check_output(std::string_view part,
                  const at::Tensor& output,
                  at::IntArrayRef shape,
                  std::string_view layout,
                  const at::Device& device);

/// Counts >= 0, one for each expert, on a device; `whole` refuses floating ones. The values are
/// read where that needs no wait for a device.
void check_counts(std::string_view owner,
                  std::string_view argument,
                  const at::Tensor& counts,
                  int64_t num_experts,
                  const at::Device& device,
                  bool whole = false);

/// A mask of the tokens of x [..., H]: bool, x's leading dimensions, on its device.
void check_token_mask(const at::Tensor& token_mask, const at::Tensor& x);

}  // namespace torchmoe::nn

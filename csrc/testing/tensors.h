// Small tools of the gradient check.
#pragma once

#include <cmath>
#include <cstdint>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/custom_function.h>

#include "types.h"

namespace torchmoe::testing::detail {

// A fault of the function under test. Not a std::exception, so that it is told apart from what
// the function throws itself.
struct Fault {
  std::string message;
};

template <typename... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  std::ostringstream text;
  text << std::setprecision(10);
  (text << ... << parts);
  throw Fault{text.str()};
}

// Passes its input on and gives an undefined gradient back.
struct UndefinedGradient : torch::autograd::Function<UndefinedGradient> {
  static at::Tensor forward(torch::autograd::AutogradContext* /*ctx*/, const at::Tensor& x) {
    return x.clone();
  }
  static Tensors backward(torch::autograd::AutogradContext* /*ctx*/, const Tensors& /*grads*/) {
    return {at::Tensor()};
  }
};

// A copy with the same strides, so that the function sees the layout which the caller chose.
inline at::Tensor copy_of(const at::Tensor& x) {
  at::NoGradGuard no_grad;
  if (!x.defined() || at::has_internal_overlap(x) == at::MemOverlap::Yes) {
    return x.defined() ? x.detach() : x;
  }
  return at::empty_strided(x.sizes(), x.strides(), x.options()).copy_(x);
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) {
    return false;
  }
  if (!a.defined()) {
    return true;
  }
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return false;
  }
  return a.eq(b).logical_or_(a.ne(a).logical_and_(b.ne(b))).all().item<bool>();
}

inline std::vector<int64_t> entry_of(int64_t flat, at::IntArrayRef sizes) {
  std::vector<int64_t> entry(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; flat /= sizes[d]) {
    entry[d] = flat % sizes[d];
  }
  return entry;
}

inline at::Tensor entry_at(const at::Tensor& x, int64_t flat) {
  at::Tensor entry = x.detach();
  for (int64_t i : entry_of(flat, x.sizes())) {
    entry = entry.select(0, i);
  }
  return entry;
}

inline Tensors snapshot(const Tensors& tensors) {
  at::NoGradGuard no_grad;
  Tensors copies;
  for (const at::Tensor& x : tensors) {
    copies.push_back(x.defined() ? x.clone() : x);
  }
  return copies;
}

// Weights for the outputs that differ from entry to entry, without touching any generator.
inline at::Tensor cotangent_of(const at::Tensor& output) {
  return at::arange(output.numel(), output.options())
      .mul_(0.7)
      .add_(0.3)
      .cos_()
      .view(output.sizes());
}

// The same values in memory with a NaN after every entry.
inline at::Tensor with_gaps(const at::Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.push_back(2);
  return at::full(sizes, std::nan(""), x.options()).select(-1, 0).copy_(x);
}

}  // namespace torchmoe::testing::detail

// Modules with buffers that must not be rounded to 16 bits with the parameters.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>

namespace torchmoe::nn {

/// Base of modules with buffers that stay float32 or wider: a 16-bit running average stops moving,
/// as its steps are smaller than half a unit in the last place. `to` and `clone` leave them wide.
///
///     struct AverageImpl : torchmoe::nn::Remembering<AverageImpl> {
///       AverageImpl() { reset(); }
///       void reset() override { average = register_wide_buffer("average", torch::zeros({8})); }
///       torch::Tensor average;
///     };
template <typename Derived>
class Remembering : public torch::nn::Cloneable<Derived> {
 public:
  using torch::nn::Cloneable<Derived>::Cloneable;

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<at::Device>& device = std::nullopt) const override {
    const auto copy = torch::nn::Cloneable<Derived>::clone(device);
    if (device) {
      std::dynamic_pointer_cast<Remembering>(copy)->follow(*device);
    }
    return copy;
  }

  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override {
    keep_wide([&] { torch::nn::Module::to(device, dtype, non_blocking); });
    follow(device);
  }
  void to(at::ScalarType dtype, bool non_blocking = false) override {
    keep_wide([&] { torch::nn::Module::to(dtype, non_blocking); });
  }
  void to(at::Device device, bool non_blocking = false) override {
    torch::nn::Module::to(device, non_blocking);
    follow(device);
  }

 protected:
  /// Moves what is not a parameter or buffer, such as tables that are settings.
  virtual void follow(at::Device /*device*/) {}

  /// Registers `values` in float32, or in their own type if that is wider.
  at::Tensor register_wide_buffer(const std::string& name, const at::Tensor& values) {
    const auto dtype = at::promote_types(at::kFloat, values.scalar_type());
    auto& buffer = this->register_buffer(name, values.to(dtype));
    wide_buffers_.insert(name);
    return buffer;
  }

 private:
  template <typename Conversion>
  void keep_wide(const Conversion& convert) {
    std::map<std::string, at::Tensor> before;
    for (const auto& name : wide_buffers_) {
      before[name] = this->named_buffers(/*recurse=*/false)[name].detach();
    }
    convert();
    for (auto& buffer : this->named_buffers(/*recurse=*/false)) {
      const auto kept = before.find(buffer.key());
      if (kept != before.end() && buffer->itemsize() < 4) {
        buffer->set_data(kept->second.to(buffer->device()));
      }
    }
  }

  std::set<std::string> wide_buffers_;
};

}  // namespace torchmoe::nn

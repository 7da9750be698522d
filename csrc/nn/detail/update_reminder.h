// A warning for training loops that never call MoEImpl::update.
#pragma once

#include <atomic>
#include <string>

#include <c10/util/Exception.h>

namespace torchmoe::nn {

/// Says once that nothing moves what parts of the layer read: it counts forward passes in training
/// until `update` is called for the first time. It is no part of the layer's state.
class UpdateReminder {
 public:
  /// `reader` is what reads something that `update` moves; empty: nothing does.
  void count(const std::string& reader) {
    if (!reader.empty() && left_ > 0 && left_.fetch_sub(1) == 1) {
      TORCH_WARN("MoE: update must be called once per optimizer step for ",
                 reader,
                 ", got ",
                 kPasses,
                 " forward passes in training without: moe->update(output.routing)");
    }
  }

  void stop() { left_ = 0; }

 private:
  static constexpr int kPasses = 100;
  std::atomic<int> left_ = kPasses;
};

}  // namespace torchmoe::nn

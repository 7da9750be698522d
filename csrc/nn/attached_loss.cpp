#include "nn/attached_loss.h"

#include <cmath>
#include <ostream>
#include <utility>

#include "nn/detail/checks.h"
#include "ops/attach_loss.h"

namespace torchmoe::nn {

WithAttachedLossImpl::WithAttachedLossImpl(MoE layer, double scale) : moe(std::move(layer)) {
  TORCH_CHECK_TYPE(!moe.is_empty(), "WithAttachedLoss: moe must be a MoE, got an empty holder");
  set_scale(scale);
  register_module("moe", moe);
}

void WithAttachedLossImpl::reset() {
  moe = register_module("moe", std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  on_output = nullptr;
}

void WithAttachedLossImpl::set_scale(double scale) {
  TORCH_CHECK_VALUE(
      std::isfinite(scale), "WithAttachedLoss: scale must be a finite number, got ", shown(scale));
  scale_ = scale;
}

void WithAttachedLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::WithAttachedLoss(scale=" << shown(scale_) << ")";
}

at::Tensor WithAttachedLossImpl::forward(const at::Tensor& x,
                                         const at::Tensor& token_mask,
                                         const at::Tensor& earlier_counts) {
  const auto output = moe->forward(x, token_mask, earlier_counts);
  if (on_output) {
    on_output(output);
  }
  return attach_loss(output.hidden_states, scale_ * output.aux_loss);
}

}  // namespace torchmoe::nn

#include "model.h"

#include <vector>

#include <torch/nn/init.h>
#include <torch/types.h>

#include "settings.h"

namespace {

torch::nn::Linear linear(int64_t in, int64_t out) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
}

torch::nn::LayerNorm norm(int64_t hidden_size) {
  return torch::nn::LayerNorm(torch::nn::LayerNormOptions({hidden_size}));
}

}  // namespace

AttentionImpl::AttentionImpl(int64_t hidden_size, int64_t context)
    : qkv_(register_module("qkv", linear(hidden_size, 3 * hidden_size))),
      out_(register_module("out", linear(hidden_size, hidden_size))) {
  const auto exponent = torch::arange(0, kHeadSize, 2) * (-1.0 / kHeadSize);           // [D/2]
  const auto angle = torch::arange(context).unsqueeze(1) * torch::pow(1e4, exponent);  // [S, D/2]
  cos_ = angle.cos();  // no buffers: they follow from the settings and need no place in a file
  sin_ = angle.sin();
  torch::nn::init::zeros_(out_->weight);  // starts by adding nothing to the residual stream
}

at::Tensor AttentionImpl::forward(const at::Tensor& x) {
  const int64_t batch = x.size(0), length = x.size(1), hidden_size = x.size(2);
  const auto parts = qkv_(x)
                         .view({batch, length, 3, hidden_size / kHeadSize, kHeadSize})
                         .permute({2, 0, 3, 1, 4})
                         .unbind();  // three of [B, N, S, D]
  const auto y = torch::scaled_dot_product_attention(rotate(parts[0]),
                                                     rotate(parts[1]),
                                                     parts[2],
                                                     /*attn_mask=*/{},
                                                     /*dropout_p=*/0.0,
                                                     /*is_causal=*/true);  // [B, N, S, D]
  return out_(y.transpose(1, 2).reshape({batch, length, hidden_size}));
}

at::Tensor AttentionImpl::rotate(const at::Tensor& x) const {
  // Each pair of features turns by an angle that grows with the position.
  const auto cos = cos_.narrow(0, 0, x.size(2)), sin = sin_.narrow(0, 0, x.size(2));  // [S, D/2]
  const auto halves = x.chunk(2, /*dim=*/-1);  // two of [B, N, S, D/2]
  const auto &a = halves[0], &b = halves[1];
  return torch::cat({a * cos - b * sin, a * sin + b * cos}, /*dim=*/-1);
}

BlockImpl::BlockImpl(const Settings& settings)
    : attention_norm_(register_module("attention_norm", norm(settings.hidden_size))),
      experts_norm_(register_module("experts_norm", norm(settings.hidden_size))),
      attention_(register_module("attention", Attention(settings.hidden_size, settings.context))),
      experts_(
          register_module("experts",
                          torchmoe::nn::MoE(torchmoe::nn::MoEOptions(settings.hidden_size,
                                                                     settings.intermediate_size,
                                                                     settings.experts,
                                                                     settings.top_k)))) {}

torchmoe::nn::MoEOutput BlockImpl::forward(const at::Tensor& x) {
  const auto attended = x + attention_(attention_norm_(x));  // [B, S, H]
  auto output = experts_->forward(experts_norm_(attended));
  output.hidden_states = attended + output.hidden_states;
  return output;
}

ByteLMImpl::ByteLMImpl(const Settings& settings)
    : embedding_(
          register_module("embedding", torch::nn::Embedding(kVocabulary, settings.hidden_size))),
      blocks_(register_module("blocks", torch::nn::ModuleList())),
      norm_(register_module("norm", norm(settings.hidden_size))),
      head_(register_module("head", linear(settings.hidden_size, kVocabulary))) {
  for (int64_t layer = 0; layer < settings.layers; ++layer) {
    blocks_->push_back(Block(settings));
  }
  torch::nn::init::zeros_(head_->weight);  // starts with even odds, 8 bits per byte
}

ByteLMImpl::Output ByteLMImpl::forward(const at::Tensor& tokens) {
  auto x = embedding_(tokens);  // [B, S, H]
  auto aux_loss = torch::zeros({});
  std::vector<at::Tensor> counts;
  for (const auto& block : *blocks_) {
    const auto output = block->as<Block>()->forward(x);
    x = output.hidden_states;
    aux_loss = aux_loss + output.aux_loss;
    counts.push_back(output.routing.tokens_per_expert);
  }
  return {head_(norm_(x)), aux_loss, torch::stack(counts)};
}

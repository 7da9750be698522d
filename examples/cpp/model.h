// A decoder-only transformer over bytes whose feed-forward layers are mixtures of experts.
//
// Shapes: B windows, S bytes each, H hidden size, N heads, D head size, L layers, E experts.
#pragma once

#include <cstdint>

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>

#include <torchmoe/nn/moe.h>

struct Settings;

constexpr int64_t kVocabulary = 256;  // a token is a byte
constexpr int64_t kHeadSize = 32;

/// Causal self-attention with rotary positions.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(int64_t hidden_size, int64_t context);

  at::Tensor forward(const at::Tensor& x);  // [B, S, H] to the same

 private:
  at::Tensor rotate(const at::Tensor& x) const;  // [B, N, S, D] to the same

  torch::nn::Linear qkv_, out_;
  at::Tensor cos_, sin_;  // [context, D/2]
};
TORCH_MODULE(Attention);

/// Attention, then the experts, each added to the residual stream.
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const Settings& settings);

  /// x [B, S, H]; `hidden_states` of the output is the new residual stream.
  torchmoe::nn::MoEOutput forward(const at::Tensor& x);

 private:
  torch::nn::LayerNorm attention_norm_, experts_norm_;
  Attention attention_;
  torchmoe::nn::MoE experts_;
};
TORCH_MODULE(Block);

class ByteLMImpl : public torch::nn::Module {
 public:
  explicit ByteLMImpl(const Settings& settings);

  struct Output {
    at::Tensor logits;             // [B, S, kVocabulary], of each next byte
    at::Tensor aux_loss;           // scalar: balances the experts; add it to the loss
    at::Tensor tokens_per_expert;  // int64 [L, E]
  };
  Output forward(const at::Tensor& tokens);  // int64 [B, S]

 private:
  torch::nn::Embedding embedding_;
  torch::nn::ModuleList blocks_;
  torch::nn::LayerNorm norm_;
  torch::nn::Linear head_;
};
TORCH_MODULE(ByteLM);

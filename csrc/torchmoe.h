// Every op and module of torchmoe.
//
//     what                                                   C++                 Python
//     ops and their gradients of every order                 torchmoe::NAME      torchmoe.ops
//     layer, router, experts, shared experts, attached loss  torchmoe::nn        torchmoe.nn
//     Gate, Capacity, Balance, Assistance                    option structs      same names, messages
//     selection bias, groups, usage, dynamic capacity        yes                 yes
//     custom router, experts, shared experts                 module or function  module
//     exact, straight_through, straight_through_dense        by name             by name
//     a custom estimator                                     three methods       also by name
//     default_vector, sparsemixer, gumbel_straight_through   -                   by name
//     further losses                                         functions           names and functions
//     several processes                                      all_reduce          process_group
//     other routers, router_input, ExpertList,               -                   yes
//     expert communication
//     a routing cache                                        its ops             yes
//     replay, presets, monitoring, adapters, studies,        -                   yes
//     experts in a file
//     checks of gradients and layers                         testing.h           torchmoe.testing
//     state dicts: safetensors, torch.save, both ways        serialize/          torch's own
#pragma once

#include "nn/assistance.h"
#include "nn/attached_loss.h"
#include "nn/balance.h"
#include "nn/capacity.h"
#include "nn/estimator.h"
#include "nn/expert_capacity.h"
#include "nn/experts.h"
#include "nn/gate.h"
#include "nn/moe.h"
#include "nn/remembering.h"
#include "nn/replaceable.h"
#include "nn/router.h"
#include "nn/routing.h"
#include "nn/selection_bias.h"
#include "nn/shared_experts.h"
#include "nn/usage.h"
#include "ops/attach_dense_gradient.h"
#include "ops/attach_loss.h"
#include "ops/cache_insert.h"
#include "ops/cache_lookup.h"
#include "ops/cache_signatures.h"
#include "ops/dispatch_plan.h"
#include "ops/expert_mlp.h"
#include "ops/gate_weights.h"
#include "ops/grouped_linear.h"
#include "ops/grouped_mlp.h"
#include "ops/limit_capacity.h"
#include "ops/load_balancing_loss.h"
#include "ops/mean_over_tokens.h"
#include "ops/permute.h"
#include "ops/router_logits.h"
#include "ops/router_z_loss.h"
#include "ops/scale_gradient.h"
#include "ops/select_experts.h"
#include "ops/sum_by_expert.h"
#include "ops/unpermute.h"
#include "serialize/state_dict.h"

// Every op and module of torchmoe.
#pragma once

#include "nn/moe.h"
#include "ops/attach_dense_gradient.h"
#include "ops/attach_loss.h"
#include "ops/dispatch_plan.h"
#include "ops/expert_mlp.h"
#include "ops/gate_weights.h"
#include "ops/grouped_linear.h"
#include "ops/limit_capacity.h"
#include "ops/load_balancing_loss.h"
#include "ops/mean_over_tokens.h"
#include "ops/permute.h"
#include "ops/router_logits.h"
#include "ops/router_z_loss.h"
#include "ops/scale_gradient.h"
#include "ops/select_experts.h"
#include "ops/unpermute.h"

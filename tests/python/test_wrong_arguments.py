"""Every argument of every public constructor and function, given what it cannot take.

A row says what kind an argument is of; a kind says what it refuses. An argument without a row fails
the test, so that a new one gets one.
"""

from __future__ import annotations

import inspect

import pytest
import torch

import torchmoe
import torchmoe.offload
from built_in import ESTIMATORS, ROUTERS, needed
from offload_arguments import OFFLOAD
from tool_arguments import TOOLS
from torchmoe import RoutingCache, losses, ops
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    MoE,
    SharedExperts,
    WithAttachedLoss,
)
from wrong_arguments import MODULE, Case, by_annotations, check_named, wrong

T, H, INNER, E, K = 6, 4, 3, 4, 2

SIZES = {"hidden_size": H, "num_experts": E}
OF_SIZES = {"hidden_size": "size", "num_experts": "size"}
MADE = {"device": "device", "dtype": "dtype"}
LOGITS = torch.randn(T, E)
IDS = torch.randint(0, E, (T, K))
PLAN = ops.dispatch_plan(IDS, E)
X = torch.randn(T, H)
WEIGHTS = torch.rand(T, K)
NAMES = {"score_function": "softmax", "normalize": "topk", "estimator": "exact"}
MLP = {"w_in": torch.randn(E, 2 * INNER, H), "b_in": None, "w_out": torch.randn(E, H, INNER),
       "b_out": None, "activation": "geglu"}  # fmt: skip
OF_MLP = (
    dict.fromkeys(("w_in", "b_in", "w_out", "b_out"), "tensor")
    | {"activation": "name", "interleaved": "flag"}
    | dict.fromkeys(("alpha", "limit", "up_offset", "gate_softcap", "up_softcap"), "number")
)
MASKED = {"token_mask": "tensor"}
ENTRIES = ops.CacheTable(torch.randn(E, H), torch.zeros(E, 1, dtype=torch.int64))
LOOKED_UP = {"x": X, "signatures": torch.zeros(T, 1, dtype=torch.int64), "table": ENTRIES,
             "similarity": 0.98}  # fmt: skip
OF_LOOKED_UP = {"x": "tensor", "signatures": "tensor", "table": "part", "similarity": "number"}

CASES = [
    *(row for kind in ROUTERS if (row := by_annotations(kind, needed(kind, H, E, K)))),
    *(row for kind in ESTIMATORS.values() if (row := by_annotations(kind, {}))),
    Case(
        MoE,
        "MoE",
        SIZES | {"intermediate_size": INNER, "top_k": K},
        OF_SIZES
        | MADE
        | {
            "intermediate_size": "size",
            "top_k": "size",
            "activation": "name",
            "bias": "flag",
            "gate": "part",
            "capacity": "part",
            "balance": "part",
            "assistance": "part",
            "process_group": "part",
            "shared_experts": "module",
            "routed_scaling_factor": "number",
            "router": "module",
            "experts": "part",
            "cache": "part",
        },
        parts=("Experts",),
    ),
    Case(
        RoutingCache,
        "RoutingCache",
        {"max_entries": 8},
        {"max_entries": "size", "similarity": "number", "eviction": "name", "reuse": "name"},
    ),
    Case(
        Balance,
        "Balance",
        {},
        {
            "weight": "number",
            "z_loss_weight": "number",
            "losses": "part",
            "fraction_from": "name",
            "fraction_choices": "name",
            "selection_bias_rate": "number",
            "selection_bias_centred": "flag",
        },
    ),
    Case(
        SharedExperts,
        "SharedExperts",
        {"hidden_size": H, "intermediate_size": INNER},
        MADE
        | {
            "hidden_size": "size",
            "intermediate_size": "size",
            "activation": "name",
            "bias": "flag",
        },
        parts=("Experts",),
    ),
    Case(
        Experts,
        "Experts",
        SIZES | {"intermediate_size": INNER},
        OF_SIZES | MADE | {"intermediate_size": "size", "activation": "name", "bias": "flag"},
    ),
    Case(
        ExpertCommunication,
        "ExpertCommunication",
        SIZES | {"experts": Experts(H, INNER, E)},
        OF_SIZES | MADE | {"experts": "part", "size": "size", "num_heads": "size"},
    ),
    Case(ExpertList, "ExpertList", {"modules": [MODULE]}, {"modules": "part"}),
    Case(
        WithAttachedLoss,
        "WithAttachedLoss",
        {"moe": MoE(H, INNER, E, K)},
        {"moe": "module", "scale": "number"},
        takes={"scale": ("-1",)},
    ),
    Case(
        Gate,
        "Gate",
        {},
        {
            "score_function": "name",
            "normalize": "name",
            "estimator": "name",
            "num_groups": "size",
            "top_groups": "size",
        },
    ),
    Case(
        Capacity,
        "Capacity",
        {"factor": 1.0},
        {
            "factor": "number",
            "eval_factor": "number",
            "minimum": "integer",
            "order": "name",
            "overflow": "name",
            "normalize": "name",
            "priority": "name",
            "backup": "table",
            "rounding": "name",
            "dynamic": "flag",
        },
    ),
    Case(
        Assistance,
        "Assistance",
        {"backup": (1, 2, 3, 0)},
        {
            "backup": "table",
            "threshold": "number",
            "lower_threshold": "number",
            "patience": "size",
        },
    ),
    Case(
        torchmoe.expert_capacity,
        "expert_capacity",
        {"num_tokens": T, "num_experts": E, "top_k": K, "capacity_factor": 1.0},
        {
            "num_tokens": "integer",
            "num_experts": "size",
            "top_k": "size",
            "capacity_factor": "number",
            "min_capacity": "integer",
            "rounding": "name",
        },
    ),
    Case(
        torchmoe.dynamic_capacity,
        "dynamic_capacity",
        {"usage": torch.ones(E), "num_slots": T},
        {"usage": "tensor", "num_slots": "integer", "factor": "number"},
    ),
    Case(
        torchmoe.update_selection_bias,
        "update_selection_bias",
        {"bias": torch.zeros(E), "tokens_per_expert": torch.ones(E), "rate": 0.1},
        {"bias": "tensor", "tokens_per_expert": "tensor", "rate": "number", "centred": "flag"},
    ),
    Case(
        losses.importance_loss,
        "importance_loss",
        {"weights": WEIGHTS, "indices": IDS, "num_experts": E},
        MASKED | {"weights": "tensor", "indices": "tensor", "num_experts": "size"},
    ),
    Case(
        losses.load_loss,
        "load_loss",
        {"logits": LOGITS, "top_k": K},
        MASKED
        | {"logits": "tensor", "top_k": "size", "noisy_logits": "tensor", "deviation": "number"},
    ),
    *(
        Case(
            getattr(losses, name),
            name,
            {"logits": LOGITS, "score_function": "softmax"},
            MASKED | {"logits": "tensor", "score_function": "name"},
        )
        for name in ("local_entropy_loss", "global_entropy_loss", "mutual_information_loss")
    ),
    Case(
        ops.router_logits,
        "router_logits",
        {"x": X, "weight": torch.randn(E, H)},
        {"x": "tensor", "weight": "tensor", "bias": "tensor"},
    ),
    Case(
        ops.select_experts,
        "select_experts",
        {"scores": LOGITS, "top_k": K},
        MASKED
        | {"scores": "tensor", "top_k": "size", "selection_bias": "tensor", "tie_break": "tensor"},
    ),
    Case(
        ops.limit_capacity,
        "limit_capacity",
        {"indices": IDS, "capacity": torch.full((E,), 2)},
        {
            "indices": "tensor",
            "capacity": "part",
            "order": "name",
            "priority": "tensor",
            "overflow": "name",
            "scores": "tensor",
            "backup": "tensor",
            "tie_break": "tensor",
            "num_experts": "integer",
        },
        takes={"capacity": ("3",)},
    ),
    Case(
        ops.gate_weights,
        "gate_weights",
        {"logits": LOGITS, "indices": IDS} | NAMES,
        {"logits": "tensor", "indices": "tensor"} | dict.fromkeys(NAMES, "name"),
    ),
    Case(
        ops.dispatch_plan,
        "dispatch_plan",
        {"indices": IDS, "num_experts": E},
        {"indices": "tensor", "num_experts": "integer"},
    ),
    Case(
        ops.cache_signatures,
        "cache_signatures",
        {"x": X, "planes": torch.randn(1, 2, H)},
        {"x": "tensor", "planes": "tensor", "row_mask": "tensor"},
    ),
    Case(
        ops.cache_lookup,
        "cache_lookup",
        LOOKED_UP | {"order": torch.arange(E).unsqueeze(0)},
        OF_LOOKED_UP | {"order": "tensor"},
    ),
    Case(
        ops.cache_insert,
        "cache_insert",
        LOOKED_UP
        | dict.fromkeys(("last_used", "uses"), torch.zeros(E, dtype=torch.int64))
        | {"eviction": "lru"},
        OF_LOOKED_UP | {"last_used": "tensor", "uses": "tensor", "eviction": "name"},
    ),
    Case(ops.permute, "permute", {"x": X, "plan": PLAN}, {"x": "tensor", "plan": "part"}),
    Case(
        ops.unpermute,
        "unpermute",
        {"rows": torch.randn(T * K, H), "weights": WEIGHTS, "plan": PLAN},
        {"rows": "tensor", "weights": "tensor", "plan": "part"},
    ),
    Case(
        ops.grouped_linear,
        "grouped_linear",
        {
            "rows": torch.randn(T * K, H),
            "weight": torch.randn(E, INNER, H),
            "bias": None,
            "expert_offsets": PLAN.expert_offsets,
        },
        dict.fromkeys(("rows", "weight", "bias", "expert_offsets"), "tensor"),
    ),
    Case(
        ops.sum_by_expert,
        "sum_by_expert",
        {"rows": torch.randn(T * K, H), "expert_offsets": PLAN.expert_offsets},
        dict.fromkeys(("rows", "expert_offsets"), "tensor"),
    ),
    Case(
        ops.expert_mlp,
        "expert_mlp",
        {"x": X, "indices": IDS, "weights": WEIGHTS} | MLP,
        {"x": "tensor", "indices": "tensor", "weights": "tensor"} | OF_MLP,
        takes={"up_offset": ("-1",)},
    ),
    Case(
        ops.grouped_mlp,
        "grouped_mlp",
        {"rows": X, "expert_offsets": PLAN.expert_offsets} | MLP,
        {"rows": "tensor", "expert_offsets": "tensor"} | OF_MLP,
        takes={"up_offset": ("-1",)},
    ),
    Case(
        ops.attach_dense_gradient,
        "attach_dense_gradient",
        {"y": X, "probs": LOGITS, "x": X} | MLP,
        {"y": "tensor", "probs": "tensor", "x": "tensor"} | OF_MLP,
        takes={"up_offset": ("-1",)},
    ),
    Case(
        ops.load_balancing_loss,
        "load_balancing_loss",
        {"logits": LOGITS, "fraction": torch.ones(E), "score_function": "softmax"},
        MASKED | {"logits": "tensor", "fraction": "tensor", "score_function": "name"},
    ),
    Case(
        ops.mean_over_tokens, "mean_over_tokens", {"values": LOGITS}, MASKED | {"values": "tensor"}
    ),
    Case(ops.router_z_loss, "router_z_loss", {"logits": LOGITS}, MASKED | {"logits": "tensor"}),
    Case(
        ops.scale_gradient,
        "scale_gradient",
        {"x": X, "scale": torch.ones(1)},
        {"x": "tensor", "scale": "tensor"},
    ),
    Case(
        ops.attach_loss,
        "attach_loss",
        {"x": X, "loss": torch.tensor(1.0)},
        {"x": "tensor", "loss": "tensor", "scale": "number"},
        takes={"scale": ("-1",)},
    ),
]

ALL = [*CASES, *TOOLS, *OFFLOAD]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.owner)
def test_every_argument_has_a_row(case: Case) -> None:
    arguments = set(inspect.signature(case.call).parameters)
    assert arguments == set(case.kinds) | set(case.others)
    case.call(**case.good)


@pytest.mark.parametrize(("case", "argument", "value"), wrong(ALL))
def test_a_wrong_argument_is_named(case: Case, argument: str, value: object) -> None:
    check_named(case, argument, value)


WITHOUT_ARGUMENTS = {
    "ContextRouter",
    "Estimator",
    "ExpertsDeclaration",
    "RouterDeclaration",
    "build_info",
    "keep_freed_memory",
    "known_estimators",
    "known_laws",
    *(kind.__name__ for kind in ESTIMATORS.values() if not by_annotations(kind, {})),
}
# Made by torchmoe and not by its users.
RESULTS = {
    "CacheInsertion",
    "CacheTable",
    "CachedRouting",
    "Certificate",
    "Finding",
    "Law",
    "NotAsked",
    "Decision",
    "DispatchPlan",
    "EstimatorComparison",
    "EstimatorResult",
    "ExpertStore",
    "LossInputs",
    "Machine",
    "MoEOutput",
    "OffloadPlan",
    "OffloadedExperts",
    "RouterGeometry",
    "RouterOutput",
    "Routing",
    "RoutingStatistics",
    "UnstableSelectionError",
    "Watcher",
}
# Its fields are arguments of the layer that it makes, and checked by that.
OF_A_LAYER = {"Preset"}


def test_everything_public_has_a_row() -> None:
    public = {
        name
        for module in (torchmoe, torchmoe.nn, torchmoe.offload, torchmoe.presets, torchmoe.testing)
        for name in module.__all__
        if callable(getattr(module, name))
    }
    public |= {
        name
        for module in (ops, losses)
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    rows = {case.call.__name__ for case in ALL}
    assert public - rows == WITHOUT_ARGUMENTS | RESULTS | OF_A_LAYER

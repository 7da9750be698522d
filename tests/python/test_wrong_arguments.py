"""Every argument of every public constructor and function, given what it cannot take.

A row says what kind an argument is of; a kind says what it refuses. An argument without a row fails
the test, so that a new one gets one.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import torchmoe
from torchmoe import losses, ops
from torchmoe.nn import (
    Assistance,
    Capacity,
    CosineRouter,
    DefaultVector,
    ExpertChoiceRouter,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    GumbelStraightThrough,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
    SparseMixer,
    WithAttachedLoss,
)

T, H, INNER, E, K = 6, 4, 3, 4, 2
TENSOR = torch.ones(2)
MODULE = nn.Linear(2, 2)

# What no kind takes but those that say so.
COMMON: dict[str, Any] = {"complex": 1j, "a set": {1}, "a class": dict}

KINDS: dict[str, dict[str, Any]] = {
    "size": {"None": None, "a float": 1.5, "a flag": True, "text": "2", "0": 0, "-1": -1,
             "NaN": math.nan, "a tensor": torch.tensor(2), "a module": MODULE},
    "integer": {"None": None, "a float": 1.5, "a flag": True, "text": "2", "a tensor": TENSOR},
    "number": {"text": "1", "a flag": True, "NaN": math.nan, "inf": math.inf,
               "a tensor": torch.tensor(0.5), "a module": MODULE},
    "flag": {"text": "False", "1": 1, "a tensor": torch.tensor(True), "None": None},
    "name": {"another": "nothing like it", "1": 1, "a tensor": TENSOR, "a list": ["softmax"]},
    "part": {"text": "x", "3": 3, "a tensor": TENSOR},
    "module": {"text": "x", "3": 3, "a tensor": TENSOR, "a function": torch.relu},
    "tensor": {"text": "x", "3": 3, "a list": [1.0], "a module": MODULE},
    "device": {"1.5": 1.5, "text": "nowhere"},
    "dtype": {"text": "float32", "an integer dtype": torch.int64, "1": 1},
    "table": {"1": 1, "text": "ab", "too short": (0,), "floats": (1.0, 0.0), "itself": (0, 1)},
}  # fmt: skip


@dataclass
class Case:
    """A constructor or function with arguments that it takes, and the kind of each argument."""

    call: Callable[..., Any]
    owner: str
    good: dict[str, Any]
    kinds: dict[str, str]
    #: Values of a kind that this argument takes all the same, by argument.
    takes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Arguments that another test is for, with the reason.
    others: tuple[str, ...] = ()


SIZES = {"hidden_size": H, "num_experts": E}
OF_SIZES = {"hidden_size": "size", "num_experts": "size"}
MADE = {"device": "device", "dtype": "dtype"}
LOGITS = torch.randn(T, E)
IDS = torch.randint(0, E, (T, K))
PLAN = ops.dispatch_plan(IDS, E)
X = torch.randn(T, H)
WEIGHTS = torch.rand(T, K)
NAMES = {"score_function": "softmax", "normalize": "topk", "estimator": "exact"}
MLP = {"w_in": torch.randn(E, INNER, H), "b_in": None, "w_out": torch.randn(E, H, INNER),
       "b_out": None, "activation": "gelu"}  # fmt: skip
OF_MLP = dict.fromkeys(("w_in", "b_in", "w_out", "b_out"), "tensor") | {"activation": "name"}
OPTIONAL = ("None",)
MASKED = {"token_mask": "tensor"}

CASES = [
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
            "assistance": "part",
            "balance_weight": "number",
            "z_loss_weight": "number",
            "losses": "part",
            "fraction_from": "name",
            "fraction_choices": "name",
            "process_group": "part",
            "selection_bias_rate": "number",
            "selection_bias_centred": "flag",
            "shared_experts": "module",
            "routed_scaling_factor": "number",
            "router": "module",
            "experts": "part",
        },
    ),
    Case(
        Experts,
        "Experts",
        SIZES | {"intermediate_size": INNER},
        OF_SIZES | MADE | {"intermediate_size": "size", "activation": "name", "bias": "flag"},
    ),
    Case(
        Router,
        "Router",
        SIZES,
        OF_SIZES
        | MADE
        | {
            "bias": "flag",
            "input_jitter": "number",
            "logit_noise": "number",
            "usage_scaling": "flag",
            "track_usage": "flag",
        },
    ),
    Case(
        CosineRouter,
        "CosineRouter",
        SIZES,
        OF_SIZES
        | MADE
        | {
            "projection_size": "size",
            "temperature": "number",
            "min_temperature": "number",
            "usage_scaling": "flag",
            "track_usage": "flag",
        },
        takes={"projection_size": OPTIONAL},
    ),
    Case(
        HashRouter,
        "HashRouter",
        {"num_experts": E},
        {"num_experts": "size", "top_k": "size", "seed": "integer"},
    ),
    Case(
        SequenceRouter,
        "SequenceRouter",
        {"router": Router(H, E)},
        {"router": "module", "pooling": "name"},
    ),
    Case(
        ExpertChoiceRouter,
        "ExpertChoiceRouter",
        {"router": Router(H, E), "top_k": K},
        {
            "router": "module",
            "top_k": "size",
            "among": "name",
            "most_per_token": "size",
            "score_function": "name",
        },
        takes={"most_per_token": OPTIONAL},
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
    Case(DefaultVector, "DefaultVector", {}, {"decay": "number"}),
    Case(GumbelStraightThrough, "GumbelStraightThrough", {}, {"temperature": "number"}),
    Case(SparseMixer, "SparseMixer", {}, {"jitter": "number"}),
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
        },
        takes={"capacity": ("3",)},
        others=("num_experts",),
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
        ops.expert_mlp,
        "expert_mlp",
        {"x": X, "indices": IDS, "weights": WEIGHTS} | MLP,
        {"x": "tensor", "indices": "tensor", "weights": "tensor"} | OF_MLP,
    ),
    Case(
        ops.attach_dense_gradient,
        "attach_dense_gradient",
        {"y": X, "probs": LOGITS, "x": X} | MLP,
        {"y": "tensor", "probs": "tensor", "x": "tensor"} | OF_MLP,
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
        {"x": "tensor", "loss": "tensor"},
        others=("scale",),
    ),
]
WRONG = [
    pytest.param(case, argument, value, id=f"{case.owner}-{argument}-{name}")
    for case in CASES
    for argument, kind in case.kinds.items()
    for name, value in (KINDS[kind] | COMMON).items()
    if name not in case.takes.get(argument, ())
]


@pytest.mark.parametrize("case", CASES, ids=[case.owner for case in CASES])
def test_every_argument_has_a_row(case: Case) -> None:
    arguments = set(inspect.signature(case.call).parameters)
    assert arguments == set(case.kinds) | set(case.others)
    case.call(**case.good)


def test_every_public_function_is_there() -> None:
    tested = {case.call for case in CASES}
    public = [getattr(ops, n) for n in dir(ops) if not n.startswith("_")]
    public += [getattr(losses, n) for n in dir(losses) if n.endswith("_loss")]
    functions = [f for f in public if inspect.isfunction(f) and f.__module__.startswith("torchmoe")]
    missing = {f.__name__ for f in functions if f.__module__ != "torchmoe._checks"} - {
        f.__name__ for f in tested
    }
    assert missing - {"by_expert"} == set()


@pytest.mark.parametrize(("case", "argument", "value"), WRONG)
def test_a_wrong_argument_is_named(case: Case, argument: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        case.call(**(case.good | {argument: value}))
    message = str(caught.value)
    named = rf"^(\w+): (gate\.)?{argument} must "
    assert re.match(named, message) or re.match(named, _of_a_part(message)), message
    assert ", got " in message, message


def _of_a_part(message: str) -> str:
    """A layer's part is checked by the part, under its own name."""
    return message.replace("Experts: ", "MoE: ")

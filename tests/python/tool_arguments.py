"""The arguments of what looks at layers, checks and compares them, as rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

import torchmoe
from torchmoe import presets, testing
from torchmoe.nn import Estimator, Exact, MoE, register_estimator
from torchmoe.nn.estimators import registry
from torchmoe.testing._estimator_surrogate import check_estimator
from wrong_arguments import Case

H, INNER, E, K = 4, 3, 4, 2
X = torch.randn(3, H, dtype=torch.float64)


def _layer() -> MoE:
    return MoE(H, INNER, E, K)


@functools.wraps(register_estimator)
def _register(name: str, factory: Callable[[], Estimator]) -> None:
    register_estimator(name, factory)
    del registry._REGISTRY[name]


TOOLS = [
    Case(
        torchmoe.geometry,
        "geometry",
        {"router": nn.Linear(H, E)},
        {"router": "module"},
    ),
    Case(
        torchmoe.routing_statistics,
        "routing_statistics",
        {"routing": _layer()(X.float()).routing},
        {"routing": "part"},
    ),
    Case(
        torchmoe.watch,
        "watch",
        {"model": _layer()},
        {"model": "module", "evaluation": "flag", "every": "size", "max_records": "size"},
    ),
    Case(
        torchmoe.RoutingReplay,
        "RoutingReplay",
        {"model": _layer()},
        {"model": "module", "decisions": "part"},
    ),
    Case(
        _register,
        "register_estimator",
        {"name": "new", "factory": Exact},
        {"name": "text", "factory": "callable"},
        takes={"factory": ("a class",)},
    ),
    Case(
        testing.gradcheck,
        "gradcheck",
        {"module_or_function": torch.sin, "inputs": X},
        {
            "module_or_function": "callable",
            "inputs": "part",
            "kwargs": "part",
            "seed": "integer",
            "eps": "number",
            "margin": "number",
            "full": "flag",
            "check_forward_ad": "flag",
            "check_batched_grad": "flag",
            "raise_exception": "flag",
        },
        takes={"module_or_function": ("a class",), "inputs": ("a tensor",)},
        others=("options",),
    ),
    Case(
        testing.check_surrogate,
        "check_surrogate",
        {"subject": torch.sin, "inputs": X, "surrogate": torch.sin},
        {
            "subject": "callable",
            "inputs": "part",
            "surrogate": "part",
            "kwargs": "part",
            "seed": "integer",
            "eps": "number",
            "raise_exception": "flag",
        },
        takes={
            "subject": ("text", "a class"),
            "inputs": ("a tensor",),
            "surrogate": ("a class",),
        },
        others=("layer",),
    ),
    Case(
        check_estimator,
        "check_surrogate",
        {"estimator": "exact", "seed": 0, "eps": 1e-6},
        {
            "estimator": "name",
            "num_tokens": "integer",
            "hidden_size": "size",
            "intermediate_size": "size",
            "num_experts": "size",
            "top_k": "size",
            "score_function": "name",
            "normalize": "name",
            "masked_tokens": "integer",
            "training": "flag",
            "atol": "number",
            "rtol": "number",
            "fast_mode": "flag",
        },
        parts=("Gate", "MoE", "Experts"),
        others=("seed", "eps", "layer"),
    ),
    Case(
        testing.certify,
        "certify",
        {"layer": _layer(), "laws": ["accumulation"]},
        {
            "layer": "module",
            "inputs": "part",
            "hidden_size": "size",
            "adapter": "part",
            "laws": "part",
            "dtype": "dtype",
            "seed": "integer",
        },
        takes={"inputs": ("a tensor",), "hidden_size": ("None",)},
    ),
    Case(
        torchmoe.Adapter,
        "Adapter",
        {},
        dict.fromkeys(("hidden_states", "aux_loss", "logits", "indices", "weights"), "callable")
        | dict.fromkeys(("router", "experts", "shared_experts", "token_mask"), "text")
        | dict.fromkeys(("hidden_size", "num_experts", "top_k"), "size")
        | {"per_token": "flag", "balances": "flag", "without_gradient": "part"}
        | dict.fromkeys(("reference", "surrogate", "update"), "callable"),
        takes={
            **dict.fromkeys(
                ("hidden_states", "aux_loss", "logits", "indices", "weights"),
                ("text", "None", "a class"),
            ),
            **dict.fromkeys(
                ("router", "experts", "shared_experts", "token_mask", "hidden_size"), ("None",)
            ),
            **dict.fromkeys(("num_experts", "top_k", "per_token"), ("None",)),
            **dict.fromkeys(("reference", "surrogate", "update"), ("None", "a class")),
        },
    ),
    Case(
        testing.compare_estimators,
        "compare_estimators",
        {"moe": _layer(), "batches": [X.float()], "loss": lambda y, batch: y.sum()},
        {
            "moe": "module",
            "batches": "part",
            "loss": "callable",
            "estimators": "part",
            "seeds": "size",
            "warm_up": "integer",
        },
        takes={"batches": ("a tensor",), "loss": ("a class",)},
    ),
    Case(
        presets.switch.layer,
        "Preset",
        {"hidden_size": H, "intermediate_size": INNER, "num_experts": E},
        {"hidden_size": "size", "intermediate_size": "size", "num_experts": "size"},
        parts=("MoE", "Experts"),
        others=("changes",),
    ),
]

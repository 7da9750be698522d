"""Layers as tests/cpp/nn/parity.cpp builds them, of settings given or drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe.losses import LossInputs
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    Estimator,
    Gate,
    MoE,
    Router,
    SharedExperts,
)

HIDDEN, EXPERTS = 24, 6

BALANCE: dict[str, Any] = {
    "weight": 0.01,
    "z_loss_weight": 0.0,
    "mean_square": None,
    "noise_energy": None,
    "fraction_from": "batch",
    "fraction_choices": "all",
    "selection_bias_rate": 0.0,
    "selection_bias_centred": False,
}
CAPACITY: dict[str, Any] = {
    "factor": 1.0,
    "eval_factor": None,
    "minimum": 0,
    "order": "choice",
    "overflow": "drop",
    "normalize": "before_drop",
    "priority": None,
    "backup": None,
    "rounding": "up",
    "dynamic": False,
}
ROUTER: dict[str, Any] = {
    "linear": False,
    "bias": False,
    "input_jitter": 0.0,
    "logit_noise": 0.0,
    "usage_scaling": False,
    "track_usage": False,
}
ASSISTANCE: dict[str, Any] = {
    "backup": [1, 2, 3, 4, 5, 0],
    "threshold": None,
    "lower_threshold": None,
    "patience": 100,
}
SHARED: dict[str, Any] = {"intermediate_size": 10, "activation": "swiglu", "bias": False}
SETTINGS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 20,
    "num_experts": EXPERTS,
    "top_k": 2,
    "activation": "swiglu",
    "bias": False,
    "score_function": "softmax",
    "normalize": None,
    "estimator": "exact",
    "num_groups": 1,
    "top_groups": 1,
    "capacity": None,
    "balance": BALANCE,
    "assistance": None,
    "router": None,
    "own_experts": False,
    "shared_experts": None,
    "routed_scaling_factor": 1.0,
    "attached": False,
    "earlier_counts": False,
}


class Scales(nn.Module):
    """Custom experts: each multiplies its tokens by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(EXPERTS, HIDDEN))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum."""
        used = weights.masked_fill(indices < 0, 0).to(x.dtype).unsqueeze(-1)
        scales = self.scale.index_select(0, indices.clamp(min=0).flatten())
        return (used * scales.view(*indices.shape, -1)).sum(1) * x


class Temperature(Estimator):
    """A custom estimator."""

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The gate's, of flatter scores."""
        return super().weigh(logits / 2.0, indices)


def mean_square(inputs: LossInputs) -> Tensor:
    """A custom term."""
    return ops.mean_over_tokens(inputs.logits.square(), token_mask=inputs.token_mask).mean()


def noise_energy(inputs: LossInputs) -> Tensor:
    """One that reads everything else that a term is given."""
    noise = inputs.logits - inputs.clean_logits
    energy = ops.mean_over_tokens(noise.square(), token_mask=inputs.token_mask).mean()
    return energy + inputs.weights.mean() * (inputs.noise_deviation or 0.0)


def layer_of(settings: Mapping[str, Any]) -> MoE:
    """The Python layer of the settings."""
    balance = dict(settings["balance"])
    terms = {"mean_square": mean_square, "noise_energy": noise_energy}
    weights = {name: balance.pop(name) for name in terms}
    losses = [(terms[name], weight) for name, weight in weights.items() if weight is not None]
    router = assistance = shared = capacity = None
    if settings["capacity"] is not None:
        capacity = Capacity(**_with_tuples(settings["capacity"]))
    if settings["router"] is not None:
        router = _router(dict(settings["router"]))
    if settings["assistance"] is not None:
        assistance = Assistance(**_with_tuples(settings["assistance"]))
    if settings["shared_experts"] is not None:
        shared = SharedExperts(HIDDEN, **settings["shared_experts"])
    own = settings["estimator"] == "temperature"
    return MoE(
        settings["hidden_size"],
        settings["intermediate_size"],
        settings["num_experts"],
        settings["top_k"],
        activation=settings["activation"],
        bias=settings["bias"],
        gate=Gate(
            score_function=settings["score_function"],
            normalize=settings["normalize"],
            estimator=Temperature() if own else settings["estimator"],
            num_groups=settings["num_groups"],
            top_groups=settings["top_groups"],
        ),
        capacity=capacity,
        balance=Balance(losses=losses, **balance),
        assistance=assistance,
        router=router,
        experts=Scales() if settings["own_experts"] else None,
        shared_experts=shared,
        routed_scaling_factor=settings["routed_scaling_factor"],
    )


def _with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }


def _router(settings: dict[str, Any]) -> nn.Module:
    if settings.pop("linear"):
        return nn.Linear(HIDDEN, EXPERTS, bias=settings["bias"])
    return Router(HIDDEN, EXPERTS, **settings)


# A square, made of squares again after every step, leaves float16 behind.
BOUNDED = tuple(name for name in ops.ACTIVATIONS if name != "relu2")


def drawn_settings(seed: int) -> dict[str, Any]:
    """Settings at random; not all of them are compatible."""
    draw = random.Random(seed)

    def often(value: object, otherwise: object = None) -> Any:
        return value if draw.random() < 0.5 else otherwise

    def rarely(value: object, otherwise: object = None) -> Any:
        return value if draw.random() < 0.15 else otherwise

    def among(*values: object) -> Any:
        return draw.choice(values)

    overflow = among("drop", "next_best", "backup")
    has_backup = overflow == "backup" if draw.random() < 0.95 else overflow != "backup"
    dynamic = rarely(True, False)
    capacity = {
        "factor": among(0.4, 0.7, 0.9, 1.0, 1.1, 1.25),
        "eval_factor": often(among(0.5, 1.5)),
        "minimum": among(0, 0, 0, 2, 5),
        "order": among("choice", "token"),
        "overflow": overflow,
        "normalize": among("before_drop", "after_drop"),
        "priority": among(None, None, "random", "weight"),
        "backup": _backup(draw) if has_backup else None,
        "rounding": "up" if dynamic and draw.random() < 0.9 else among("up", "down"),
        "dynamic": dynamic,
    }
    fraction_from = among("batch", "batch", "sequence", "global_batch", "history")
    history = fraction_from == "history"
    balance = {
        "weight": among(0.0, 0.01, 0.5),
        "z_loss_weight": among(0.0, 0.0, 0.1),
        "mean_square": often(0.125),
        "noise_energy": rarely(0.25),
        "fraction_from": fraction_from,
        "fraction_choices": among("all", "first") if not history or draw.random() < 0.1 else "all",
        "selection_bias_rate": among(0.0, 0.0, 0.01, 0.125),
        "selection_bias_centred": often(True, False),
    }
    router = {
        "linear": rarely(True, False),
        "bias": often(True, False),
        "input_jitter": among(0.0, 0.0, 0.05),
        "logit_noise": among(0.0, 0.0, 0.3),
        "usage_scaling": often(True, False),
        "track_usage": draw.random() < 0.9,
    }
    assistance = {
        "backup": _backup(draw),
        "threshold": among(None, None, 1.25),
        "lower_threshold": among(None, None, 0.875),
        "patience": among(1, 2),
    }
    num_groups = among(1, 1, 1, 2, 3)
    return {
        **SETTINGS,
        "intermediate_size": among(20, 7),
        "top_k": among(1, 2, 2, 3, 6),
        "activation": among(*BOUNDED),
        "bias": often(True, False),
        "score_function": among("softmax", "sigmoid"),
        "normalize": among(None, None, "none", "topk", "uniform"),
        "estimator": among(
            "exact", "exact", "straight_through", "straight_through_dense", "temperature"
        ),
        "num_groups": num_groups,
        "top_groups": draw.randint(1, num_groups),
        "capacity": often(capacity),
        "balance": balance,
        "assistance": rarely(assistance),
        "router": often(router),
        "own_experts": rarely(True, False),
        "shared_experts": rarely(
            {
                "intermediate_size": 10,
                "activation": among(*BOUNDED),
                "bias": often(True, False),
            }
        ),
        "routed_scaling_factor": among(1.0, 1.0, 2.5),
        "attached": rarely(True, False),
        "earlier_counts": fraction_from in ("batch", "global_batch") and often(True, False),
    }


def _backup(draw: random.Random) -> list[int]:
    shift = draw.randint(1, EXPERTS - 1)
    return [(expert + shift) % EXPERTS for expert in range(EXPERTS)]


def wrong_settings() -> dict[str, dict[str, Any]]:
    """One thing wrong in each, by what it is."""
    capacity = lambda **changes: {"capacity": CAPACITY | changes}  # noqa: E731
    balance = lambda **changes: {"balance": BALANCE | changes}  # noqa: E731
    router = lambda **changes: {"router": ROUTER | changes}  # noqa: E731
    assistance: Callable[..., dict[str, Any]] = lambda **changes: {  # noqa: E731
        "assistance": ASSISTANCE | changes
    }
    cases = {
        "hidden": {"hidden_size": 0},
        "experts": {"num_experts": 0},
        "top_k": {"top_k": 7},
        "no intermediate": {"intermediate_size": None},
        "intermediate": {"intermediate_size": 0},
        "activation": {"activation": "glu"},
        "score": {"score_function": "relu"},
        "normalize": {"normalize": "sum"},
        "groups": {"num_groups": 0},
        "top groups": {"num_groups": 2, "top_groups": 3},
        "uneven groups": {"num_groups": 4},
        "few in groups": {"num_groups": 6, "top_k": 2},
        "scaling": {"routed_scaling_factor": -1.5},
        "factor": capacity(factor=-0.5),
        "nan factor": capacity(factor=float("nan")),
        "eval factor": capacity(eval_factor=float("inf")),
        "minimum": capacity(minimum=-1),
        "order": capacity(order="random"),
        "overflow": capacity(overflow="wait"),
        "when": capacity(normalize="never"),
        "priority": capacity(priority="size"),
        "rounding": capacity(rounding="half"),
        "dynamic down": capacity(dynamic=True, rounding="down"),
        "no backup": capacity(overflow="backup"),
        "needless backup": capacity(backup=[1, 2, 3, 4, 5, 0]),
        "backup of oneself": capacity(overflow="backup", backup=[1, 1, 3, 4, 5, 0]),
        "backup of nobody": capacity(overflow="backup", backup=[1, 6, 3, 4, 5, 0]),
        "one backup": capacity(overflow="backup", backup=[1]),
        "few backups": capacity(overflow="backup", backup=[1, 0]),
        "balance": balance(weight=-0.25),
        "z-loss": balance(z_loss_weight=float("inf")),
        "rate": balance(selection_bias_rate=-0.25),
        "from": balance(fraction_from="epoch"),
        "choices": balance(fraction_choices="last"),
        "first of history": balance(fraction_from="history", fraction_choices="first"),
        "weight of a term": balance(mean_square=-0.25),
        "jitter": router(input_jitter=-0.25),
        "noise": router(logit_noise=float("nan")),
        "no usage for history": balance(fraction_from="history") | router(),
        "no usage for capacity": capacity(dynamic=True) | router(linear=True),
        "no usage for assistance": assistance() | router(),
        "assistants": assistance(backup=[1, 0]),
        "assistant of oneself": assistance(backup=[0, 2, 3, 4, 5, 1]),
        "threshold": assistance(threshold=6.5),
        "high threshold": assistance(threshold=3.5),
        "lower threshold": assistance(lower_threshold=2.5),
        "patience": assistance(patience=0),
        "every expert assisted": assistance() | {"top_k": 6},
        "one expert assisted": assistance() | {"top_k": 1, "normalize": "topk"},
        "exact topk of one": {"top_k": 1, "normalize": "topk"},
        "exact uniform": {"normalize": "uniform"},
        "earlier counts": balance(fraction_from="sequence") | {"earlier_counts": True},
    }
    return {name: SETTINGS | changes for name, changes in cases.items()}

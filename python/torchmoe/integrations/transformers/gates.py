"""Which of the op's activations the gate function of a module of experts is.

A class states its gate as code, `_apply_gate`, so it is recognised by what it computes: the
activations of `expert_mlp` that the module's settings allow are compared with it, values and
gradients, on points on both sides of every bound. The function sees only those settings, so that
the answer holds wherever they are equal; a gate that reads anything else is not recognised.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

from torchmoe import ops

# What act_fn may be, and its name among the plain activations. A gate of quick_gelu is a SwiGLU
# with an alpha, which plain activations do not have.
_PLAIN: dict[Any, str] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.functional.silu: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    nn.functional.relu: "relu",
    activations.ReLUSquaredActivation: "relu2",
}
_QUICK_GELU, _QUICK_GELU_ALPHA = activations.QuickGELUActivation, 1.702
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
_SOFTCAPS = ("gate_softcap", "up_softcap")

# How many roundings two ways to write one formula may differ by.
_ROUNDINGS = 32


_Settings = tuple[tuple[str, float], ...]


class Activation(NamedTuple):
    """An activation of `expert_mlp` with its settings."""

    name: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None


class _Gate(NamedTuple):
    """All that decides what a gate function computes; no tensor and no module."""

    function: Callable[[Any, Tensor], Tensor]
    act: Any
    """The type of act_fn, or act_fn where it is a function; None if it is not known."""
    limits: _Settings
    alphas: _Settings
    softcaps: _Settings
    interleaved: bool


def activation_of(experts: Any) -> Activation | None:  # noqa: ANN401 (of many classes)
    """The activation that the module's gate, or its act_fn where it has no gate, is.

    torch.compile traces what is read of the module, so that it guards it, and takes the comparison
    as a constant.

    Args:
        experts: a module of experts in transformers' interface.

    Returns:
        None if it is none of the op's.
    """
    act_fn = getattr(experts, "act_fn", None)
    act = type(act_fn) if isinstance(act_fn, nn.Module) else act_fn
    if not experts.has_gate:
        return Activation(_PLAIN[act]) if act in _PLAIN else None
    if "_apply_gate" in experts.__dict__:
        return None
    softcaps = _softcaps(act_fn)
    known = act in _PLAIN or act is _QUICK_GELU or len(softcaps) > 0
    found = _recognised(
        type(experts)._apply_gate,
        act if known else None,
        _settings(experts, _LIMITS),
        _settings(experts, _ALPHAS),
        softcaps,
        not experts.is_concatenated,
    )
    if found is None:
        return None
    name, *settings = found
    # torch.compile cannot guard what a constant function returns, but what is made of it.
    values: list[Any] = [None if value is None else float(value) for value in settings]
    return Activation(name, *values)


def _settings(experts: nn.Module, names: tuple[str, ...]) -> _Settings:
    return _numbers((name, getattr(experts, name, None)) for name in names)


def _softcaps(act_fn: object) -> _Settings:
    """Those of an act_fn that has a module for each."""
    modules = [(name, getattr(act_fn, name, None)) for name in _SOFTCAPS]
    return _numbers((name, getattr(module, "softcap", None)) for name, module in modules)


def _numbers(values: Iterable[tuple[str, object]]) -> _Settings:
    # A float that has changed is a symbol to torch.compile; as a key of groupby it is a constant,
    # and guarded.
    return tuple(
        (name, next(itertools.groupby((value,)))[0])
        for name, value in values
        if isinstance(value, (int, float))
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recognised(*gate: Any) -> tuple[Any, ...] | None:  # noqa: ANN401 (the fields of a gate)
    return _compared(_Gate(*gate))


@functools.lru_cache(maxsize=1024)
def _compared(gate: _Gate) -> tuple[Any, ...] | None:
    """The first activation that agrees with the gate, as a tuple.

    A thread of its own has none of the caller's modes: no fake tensors, no autocast, no
    inference mode, no default device and no transform of torch.func.
    """
    # A compiled function would wait there for the compiler that is waiting here.
    if hasattr(gate.function, "_torchdynamo_orig_callable"):
        return None
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_compare, gate).result()


def _compare(gate: _Gate) -> tuple[Any, ...] | None:
    points = _points(gate)
    try:
        expected = _with_gradient(functools.partial(gate.function, _stand_in(gate)), points)
    except Exception:  # whatever code does that is given less than it reads
        return None
    for candidate in _candidates(gate):
        actual = _with_gradient(functools.partial(_apply, candidate, gate.interleaved), points)
        if _agree(actual, expected, points, gate.interleaved):
            return tuple(candidate)
    return None


def _stand_in(gate: _Gate) -> SimpleNamespace:
    """What the function is given in the place of the module."""
    seen = SimpleNamespace(**dict(gate.limits), **dict(gate.alphas))
    if gate.softcaps:
        caps = {f"mlp_{name}": cap for name, cap in gate.softcaps}
        seen.act_fn = gate.act(SimpleNamespace(**caps))
    elif gate.act is not None:
        seen.act_fn = gate.act() if isinstance(gate.act, type) else gate.act
    return seen


def _candidates(gate: _Gate) -> Iterator[Activation]:
    """The activations that can be made of the settings, the plain ones first."""
    names = dict.fromkeys(
        _GATED[plain] for plain in (_PLAIN.get(gate.act, "silu"), "silu") if plain in _GATED
    )
    alphas = [_QUICK_GELU_ALPHA] if gate.act is _QUICK_GELU else [1.0, *_positive(gate.alphas)]
    limits = [None, *_positive(gate.limits)]
    caps = dict(gate.softcaps)
    for name, limit, alpha, offset in itertools.product(names, limits, alphas, (0.0, 1.0)):
        yield Activation(name, alpha, limit, offset, **caps)


def _positive(settings: _Settings) -> list[float]:
    """The values that the op takes, each once."""
    values = dict.fromkeys(float(value) for _, value in settings)
    return [value for value in values if 0 < value < math.inf]


def _points(gate: _Gate) -> Tensor:
    """Pre-activations [N, 4] of two gates and two values, in the gate's layout.

    Numbers of float32 on both sides of 0 and of every bound, in all pairs.
    """
    ends = [-12.0, -4.0, -1.5, -0.7, -0.1, 0.0, 0.05, 0.3, 0.9, 2.5, 6.0]
    for _, bound in (*gate.limits, *gate.softcaps):
        if math.isfinite(bound):
            ends += [sign * factor * bound for sign in (-1, 1) for factor in (0.5, 1.0, 1.25, 3.0)]
    values = torch.tensor(ends, dtype=torch.float32, device="cpu").double()
    # A bound that float32 does not have must be met exactly.
    bounds = [sign * bound for _, bound in gate.limits for sign in (-1, 1) if math.isfinite(bound)]
    values = torch.cat([values, torch.tensor(bounds, dtype=torch.float64, device="cpu")])
    pairs = torch.cartesian_prod(values, values)
    gates = torch.stack([pairs[:, 0], pairs[:, 0].flip(0)], dim=1)
    ups = torch.stack([pairs[:, 1], pairs[:, 1].roll(1)], dim=1)
    return torch.stack([gates, ups], dim=2 if gate.interleaved else 1).flatten(1)


def _apply(activation: Activation, interleaved: bool, points: Tensor) -> Tensor:
    """The op's activation alone: between matrices that change nothing."""
    settings = activation._asdict()
    name = settings.pop("name")
    same = torch.eye(4, dtype=points.dtype, device="cpu")[None]
    offsets = torch.tensor([0, points.shape[0]], device="cpu")
    values = ops.grouped_mlp(
        *(points, same, None, same[:, :, :2], None, offsets, name),
        interleaved=interleaved,
        **settings,
    )
    return values[:, :2]


def _with_gradient(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, 2], and the gradient [N, 4] of their weighted sum."""
    points = points.clone().requires_grad_()
    values = function(points)
    weights = torch.tensor([1.0, 0.75], dtype=values.dtype, device="cpu")
    (gradient,) = torch.autograd.grad(values, points, weights.expand_as(values))
    return values.detach(), gradient


def _agree(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    points: Tensor,
    interleaved: bool,
) -> bool:
    """Whether values and gradients are equal but for rounding.

    A gate whose values are all numbers of float32 is computed in it, whatever it is given.
    """
    values = expected[0]
    if values.dtype != torch.float64 or values.shape != actual[0].shape:
        return False
    narrow = torch.equal(values, values.float().double())
    eps = torch.finfo(torch.float32 if narrow else torch.float64).eps
    # What is rounded on the way is at most of this size: |f(g)| is at most |g|, and the slope of
    # geglu_tanh has a factor of g^2.
    gates, ups = _parted(points, interleaved)
    bound = _ROUNDINGS * eps * (1 + gates.abs()).square() * (1 + ups.abs())
    pairs = [(actual[0], values)]
    pairs += zip(_parted(actual[1], interleaved), _parted(expected[1], interleaved), strict=True)
    return all(bool(((a - e).abs() <= bound).all()) for a, e in pairs)


def _parted(columns: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gates and values, [N, 2] each."""
    gates, ups = columns.reshape(-1, 2, 2).unbind(2 if interleaved else 1)
    return gates, ups

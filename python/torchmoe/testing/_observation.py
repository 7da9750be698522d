"""What one evaluation of a function decided, seen below autograd, and the same draws for each.

A difference quotient says something about a gradient only if both of its evaluations make the same
choices. An `Observer` records the choices, and the narrowest floating type on the way, which limits
how exact an evaluation is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "AVOID_TIES",
    "Observation",
    "Observer",
    "UnstableSelectionError",
    "changed_choice",
    "changed_kink",
    "compare",
    "is_float",
    "same_draws",
    "smallest_gap",
]

# Ops of torch that turn floats into a choice.
_CHOOSING = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy",
        "argmax",
        "argmin",
        "bucketize",
        "ge",
        "gt",
        "kthvalue",
        "le",
        "lt",
        "max",
        "min",
        "multinomial",
        "searchsorted",
        "sort",
        "topk",
    )
)

# Ops of torch with a kink where their input is 0.
_WITH_KINK_AT_ZERO = frozenset(
    f"aten::{name}" for name in ("abs", "leaky_relu", "leaky_relu_", "relu", "relu_", "sign")
)

# Ops of torch that cast to another type, in addition to those with an argument dtype.
_CASTING = frozenset(("aten::_to_copy", "aten::copy_"))

# Those whose choice is a token's experts, of shape [T, K].
_ROUTING = ("select_experts", "topk")


AVOID_TIES = (
    "scores that tie have no derivative: check at random inputs, and with a router whose rows "
    "differ, not one that starts at zero"
)


class UnstableSelectionError(RuntimeError):
    """A choice of experts is tied, or changes within a step of the finite difference."""


@dataclass
class Observation:
    """What one evaluation decided.

    Attributes:
        decisions: op and result, int64 or bool, in the order of the calls.
        kinks: op and where its input is above 0, bool, in the order of the calls.
        gaps: [T] for each choice of the best scores: the distance to the next choice.
        replaced_derivatives: ops that give another gradient than their derivative on purpose.
        narrowest: the floating type of least precision to which wider values were cast.
    """

    decisions: list[tuple[str, Tensor]] = field(default_factory=list)
    kinks: list[tuple[str, Tensor]] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    replaced_derivatives: set[str] = field(default_factory=set)
    narrowest: torch.dtype = torch.float64

    @property
    def routing(self) -> Tensor | None:
        """[T, K], the first choice of experts; None where none was seen."""
        for op, ids in self.decisions:
            if op in _ROUTING and ids.dim() >= 2:
                return ids.flatten(0, -2)
        return None


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every choice that the ops below it make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observation()

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WITH_KINK_AT_ZERO:
            self.seen.kinks.append((name.split("::")[1], args[0].detach() > 0))
        result = func(*args, **kwargs)
        if name in _CASTING or "dtype" in kwargs:
            self._note_cast(name, args, result)
        if name.startswith("torchmoe::") or (name in _CHOOSING and _has_floats((args, kwargs))):
            self.seen.decisions += [
                (name.split("::")[1], leaf.detach().clone())
                for leaf in pytree.tree_leaves(result)
                if isinstance(leaf, Tensor) and not is_float(leaf)
            ]
        if name == "torchmoe::select_experts":
            self.seen.gaps.append(_gaps(*args, **kwargs))
        elif name == "torchmoe::gate_weights" and kwargs["estimator"] == "straight_through":
            self.seen.replaced_derivatives.add('gate_weights with estimator "straight_through"')
        elif name in ("torchmoe::scale_gradient", "torchmoe::attach_loss"):
            self.seen.replaced_derivatives.add(name.split("::")[1])
        return result

    def _note_cast(self, name: str, args: tuple[Any, ...], result: object) -> None:
        # What has the shape of a scalar does not have its value.
        if name.endswith("_like") or name.startswith("aten::new_") or not is_float(result):
            return
        assert isinstance(result, Tensor)
        eps = torch.finfo(result.dtype).eps
        is_narrower = any(is_float(arg) and torch.finfo(arg.dtype).eps < eps for arg in args)
        if is_narrower and eps > torch.finfo(self.seen.narrowest).eps:
            self.seen.narrowest = result.dtype


def _gaps(
    scores: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    tie_break: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The smallest distance between neighbours among each token's best top_k + 1 scores: [T].

    Equal scores are a tie whatever breaks it, since a step may tell them apart.
    """
    del tie_break
    ranked = scores.detach() if selection_bias is None else scores.detach() + selection_bias
    best = ranked.topk(min(top_k + 1, ranked.shape[-1]), dim=-1).values
    gaps = best[:, :-1] - best[:, 1:]
    # Scores of -inf do not move, and NaN is not for this check to judge.
    gaps = gaps.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if token_mask is not None:
        gaps = gaps.masked_fill(~token_mask.unsqueeze(-1), torch.inf)
    return gaps.amin(dim=-1) if gaps.shape[-1] > 0 else gaps.new_full(gaps.shape[:1], torch.inf)


def smallest_gap(seen: Observation) -> tuple[float, int | None]:
    """The smallest distance between a token's scores, and the token; inf, None without scores."""
    smallest, token = torch.inf, None
    for of_tokens in seen.gaps:
        if of_tokens.numel() > 0 and of_tokens.min().item() < smallest:
            smallest, token = of_tokens.min().item(), int(of_tokens.argmin())
    return smallest, token


def changed_choice(first: Observation, now: Observation) -> str | None:
    """What `now` chose unlike `first`, as the end of an error's message; None where nothing."""
    if len(first.decisions) != len(now.decisions):
        return (
            "function must make the same choices in every evaluation, got "
            f"{len(now.decisions)} of them after {len(first.decisions)}"
        )
    for (op, before), (_, after) in zip(first.decisions, now.decisions, strict=True):
        if torch.equal(before, after):
            continue
        where = "got another shape"
        if before.shape == after.shape:
            flat = int((before != after).flatten().nonzero()[0])
            token = flat // before.shape[-1] if before.dim() > 1 else flat
            rows = [t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t for t in (before, after)]
            where = (
                f"got {rows[1][token].tolist()} after {rows[0][token].tolist()} for token {token}"
            )
        return (
            f"{op} must choose the same at every step of the finite difference, "
            f"{where}; the inputs are too close to a tie for this eps"
        )
    return None


def changed_kink(first: Observation, now: Observation) -> bool:
    """Whether an op with a kink got elements on the other side of it."""
    if len(first.kinks) != len(now.kinks):
        return True
    pairs = zip(first.kinks, now.kinks, strict=True)
    return any(not torch.equal(before, after) for (_, before), (_, after) in pairs)


def compare(owner: str, first: Observation, now: Observation) -> None:
    """Raises UnstableSelectionError where `now` chose unlike `first`."""
    changed = changed_choice(first, now)
    if changed is not None:
        raise UnstableSelectionError(f"{owner}: {changed}")


@contextmanager
def same_draws(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Draws what follows from `seed`, on the tensors' devices, and puts the generators back."""
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def is_float(value: object) -> bool:
    """Whether it is a real floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_floats(tree: object) -> bool:
    return any(is_float(leaf) for leaf in pytree.tree_leaves(tree))

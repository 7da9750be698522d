"""The geometry of a linear gate: its experts' rows, the boundaries between them, the tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import check_among, check_integer, check_tensor
from torchmoe.monitor.watch import missing
from torchmoe.nn._sharding import full, is_sharded
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.routers.context_router import ContextRouter
from torchmoe.nn.routers.cosine_router import percent, unit

_BLOCK = 1 << 21  # pairs of experts that are looked at together: 16 MiB in float64


class Boundary(NamedTuple):
    """Where two experts have equal logits: the z with normal . z + offset = 0.

    On the side to which `normal` points, expert i has the larger logit.
    """

    normal: Tensor
    """[G] float64: w_i - w_j, logits per unit of z."""
    offset: Tensor
    """float64 scalar: b_i - b_j, in logits."""


class Flips(NamedTuple):
    """How far each token is from another set of experts, and which exchange is the nearest."""

    distance: Tensor
    """[...] float64, >= 0, in units of z: inf where no other set can be reached."""
    chosen: Tensor
    """[...] int64: the chosen expert that is lost; -1 where the distance is not finite."""
    rival: Tensor
    """[...] int64: the expert that takes its place; -1 where the distance is not finite."""


def geometry(router: nn.Module) -> RouterGeometry:
    """The geometric reading of a router whose logits are linear, W z + b.

        picture = torchmoe.geometry(moe.router)
        picture.angles                              # between the experts' rows, in degrees
        picture.flip_distances(x, moe.top_k)        # how safe each token's choice is
        picture.plot("router.png", x)

    The result is a snapshot: it shares no memory with the router, and later training does not
    change it. If the router is sharded, all processes must call this.

    Args:
        router: a `torchmoe.nn.Router`, torch.nn.Linear or any other module with a floating `weight`
            [E, H] and, if it has one, a `bias` [E]; a `torchmoe.nn.CosineRouter` or any other with
            `rows` [E, P] and a method `project` from x [T, H] to z [T, P], where the logits are
            z rows^T; or a module whose `router` or `moe` is one of these, such as
            `torchmoe.nn.MoE`, WithAttachedLoss, and routers that choose by another router's logits.
            What that module does to the tokens before its router sees them is not repeated.

    Returns:
        The rows and biases in float64 on the router's device, with methods that analyse them.

    Raises:
        TypeError: the router has none of these, or they are not such tensors.
    """
    gate: object = router
    while isinstance(gate, nn.Module):
        # The own weight of a context router may be anything.
        if not isinstance(declared_by_router(gate), ContextRouter):
            if isinstance(getattr(gate, "rows", None), Tensor) and hasattr(gate, "project"):
                return _projecting(gate)
            if isinstance(getattr(gate, "weight", None), Tensor):
                return _linear(gate)
        gate = getattr(gate, "router", getattr(gate, "moe", None))
    raise TypeError(
        "geometry: router must have a weight [num_experts, hidden_size], or rows and project, "
        f"or a router that has, got {type(router).__name__}"
    )


def _linear(gate: nn.Module) -> RouterGeometry:
    rows = _checked("weight", gate.weight, ["num_experts", "hidden_size"])
    bias = getattr(gate, "bias", None)
    bias = rows.new_zeros(len(rows)) if bias is None else _checked("bias", bias, [len(rows)])
    return RouterGeometry(rows, bias, _hidden_size=rows.shape[1])


def _projecting(gate: nn.Module) -> RouterGeometry:
    # A copy, whose projection later training does not reach either, as wide as all that is computed
    # with it.
    if any(is_sharded(parameter) for parameter in gate.parameters()):
        gate = _WholeGate(gate)
    else:
        gate = copy.deepcopy(gate).requires_grad_(False).eval().double()
    rows = _checked("rows", gate.rows, ["num_experts", "size"])
    hidden_size = getattr(gate, "hidden_size", None)
    return RouterGeometry(
        rows,
        rows.new_zeros(len(rows)),
        cast(Callable[[Tensor], Tensor], gate.project),
        hidden_size if isinstance(hidden_size, int) else None,
    )


class _WholeGate(nn.Module):
    """A sharded gate's rows and projection, with copies of its tensors: FSDP refuses deepcopy."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.hidden_size = getattr(gate, "hidden_size", None)
        self._tensors = {
            f"gate.{name}": full(tensor).detach().to(torch.float64, copy=True)
            for name, tensor in (*gate.named_parameters(), *gate.named_buffers())
            if tensor.is_floating_point()
        }

    @property
    def rows(self) -> object:
        return torch.func.functional_call(self, self._tensors, (None,))

    def project(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(self, self._tensors, (x,)))

    @torch.no_grad()
    def forward(self, x: Tensor | None) -> object:
        return self.gate.rows if x is None else cast(Any, self.gate).project(x)


def _checked(name: str, value: object, shape: list[str | int]) -> Tensor:
    """The value as float64 in memory of its own; raises TypeError unless it has the shape."""
    listed = ", ".join(map(str, shape))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        actual = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"geometry: router.{name} must be a floating tensor, got {actual}")
    fits = value.dim() == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise TypeError(
            f"geometry: router.{name} must be [{listed}], got shape {list(value.shape)}"
        )
    return full(value).detach().to(torch.float64, copy=True)


@dataclass(frozen=True, eq=False, repr=False)
class RouterGeometry:
    """The result of `geometry`: a linear gate as E vectors of size G, and the tokens among them.

    The logit of expert e is w_e . z + b_e, where z is what the gate sees of a token x: x itself,
    and G = H, unless the router projects it first (`torchmoe.nn.CosineRouter`), so that G = P. All
    distances and angles are in the space of z. A cosine router's z stays on the unit sphere, and
    all its boundaries pass through 0: if a straight line of length d leads to a boundary, z reaches
    it by turning through asin(d).

    Methods take x [..., H], floating, on the device of `rows`; their results keep the leading
    dimensions, are float64 on that device, and have no gradient. Logits are computed in float64; if
    the router's own logits are nearly equal, it may rank them differently.

    Attributes:
        rows: [E, G] float64: w_e, for each expert the direction in which its logit grows.
        bias: [E] float64, zeros if the router has none.
    """

    rows: Tensor
    bias: Tensor
    _project: Callable[[Tensor], Tensor] | None = field(default=None)
    _hidden_size: int | None = field(default=None)

    @cached_property
    def norms(self) -> Tensor:
        """[E] float64: the length of each row, logits per unit of z."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return norms

    @cached_property
    def angles(self) -> Tensor:
        """[E, E] float64: the angle between two rows in degrees, 0 to 180.

        For unit vectors u and v it is 2 atan2(|u - v|, |u + v|), which is exact to rounding even
        near 0 and 180 degrees, where acos(u . v) loses half of its digits. The diagonal is 0. NaN
        for a zero row, on the diagonal too.
        """
        unit = self.rows / self.norms.unsqueeze(1)
        radians = 2 * torch.atan2(_distances(unit, unit), _distances(unit, -unit))
        return torch.rad2deg(radians)

    @cached_property
    def _spans(self) -> Tensor:
        """[E, E]: |w_i - w_j|."""
        return _distances(self.rows, self.rows)

    def logits(self, x: Tensor) -> Tensor:
        """w_e . z + b_e, the router's logits without its noise.

        Args:
            x: [..., H] floating.

        Returns:
            [..., E] float64.

        Raises:
            RuntimeError: the shape, dtype or device of x does not fit.
        """
        z, leading = self._points(x)
        return self._logits_at(z).reshape(*leading, len(self.rows))

    def boundary(self, i: int, j: int) -> Boundary:
        """The hyperplane on which experts i and j have equal logits.

        Args:
            i: the expert on the positive side.
            j: another expert.

        Returns:
            normal [G] = w_i - w_j and the scalar offset = b_i - b_j of normal . z + offset = 0.

        Raises:
            TypeError: i or j is not an int.
            IndexError: i or j is not in [0, E).
            ValueError: i = j.
        """
        experts = len(self.rows)
        for name, expert in (("i", i), ("j", j)):
            check_integer("geometry", name, expert)
            if not 0 <= expert < experts:
                raise IndexError(f"geometry: {name} must be in [0, {experts}), got {expert}")
        if i == j:
            raise ValueError(f"geometry: j must be another expert than i, got {j} for both")
        return Boundary(self.rows[i] - self.rows[j], self.bias[i] - self.bias[j])

    def distance(self, x: Tensor, i: int, j: int) -> Tensor:
        """How far each token is from the boundary between experts i and j.

        (normal . z + offset) / |normal|: positive where i has the larger logit. If the two rows are
        equal there is no boundary, and the distance is inf or -inf by the sign of b_i - b_j, or 0
        if the biases are equal too.

        Args:
            x: [..., H] floating.
            i: the expert on the positive side.
            j: another expert.

        Returns:
            [...] float64, signed, in units of z.

        Raises:
            TypeError: i or j is not an int.
            IndexError: i or j is not in [0, E).
            ValueError: i = j.
            RuntimeError: the shape, dtype or device of x does not fit.
        """
        normal, offset = self.boundary(i, j)
        z, leading = self._points(x)
        # Not the difference of two logits, which cancels near the boundary.
        height = z @ normal + offset
        distance = torch.where(height == 0, height, height / torch.linalg.vector_norm(normal))
        return distance.reshape(leading)

    def flip_distances(self, x: Tensor, top_k: int) -> Flips:
        """The shortest distance that each token must move until its set of top_k experts changes.

        This is the smallest (logit_c - logit_u) / |w_c - w_u| over chosen experts c and others u,
        the distance to the boundary between the two. The choice is that of
        `torchmoe.ops.select_experts`, with ties to the lower id. A token on a boundary has distance
        0. Two experts with equal rows never change places, wherever the token moves.

        The time grows with the K E pairs per token; the memory is that of a fixed number of pairs.

        Args:
            x: [..., H] floating.
            top_k: K, in [1, E]; with K = E there is only one set.

        Returns:
            The distance, the chosen expert that is lost there and the expert that replaces it. If
            several pairs are at the same distance, the chosen expert that ranks best, then the
            replacement with the lowest id.

        Raises:
            TypeError: top_k is not an int.
            ValueError: top_k is out of range.
            RuntimeError: the shape, dtype or device of x does not fit.
        """
        experts = len(self.rows)
        check_among("geometry", "top_k", top_k, experts)
        z, leading = self._points(x)
        logits = self._logits_at(z)
        block = max(1, _BLOCK // (top_k * experts))
        flips = [self._flips(part, top_k) for part in torch.split(logits, block)]
        distance, chosen, rival = (
            torch.cat(parts).reshape(leading) for parts in zip(*flips, strict=True)
        )
        return Flips(distance, chosen, rival)

    def match_percentages(self, x: Tensor) -> Tensor:
        """How well each token's direction matches each expert's row, in percent.

        50 (1 + cos(z, w_e)): 100 along the row, 50 at a right angle to it, 0 opposite to it.
        Lengths and biases do not enter, so the best match need not be the largest logit. A zero
        vector, whether token or row, gives 50.

        Args:
            x: [..., H] floating.

        Returns:
            [..., E] float64, 0 to 100.

        Raises:
            RuntimeError: the shape, dtype or device of x does not fit.
        """
        z, leading = self._points(x)
        cosines = unit(z) @ unit(self.rows).T
        return percent(cosines).reshape(*leading, len(self.rows))

    def plot(self, path: str | os.PathLike[str], x: Tensor | None = None) -> None:
        """Draws which expert wins where, in the plane in which the rows differ most.

        The plane is spanned by the two leading right singular vectors of the rows minus their mean,
        because only differences between rows matter: a vector added to all of them moves every
        logit alike. The axis labels give the share of the rows' variance in each direction. If all
        of it is in one direction, as with two experts, the second axis is that of the mean row, or
        an arbitrary one.

        The plane passes through the mean of the tokens, or through 0 without tokens. Each point has
        the colour of the expert with the largest logit there, and each region shows its expert's
        number. An arrow for each expert, from the centre, is its row minus the mean row: in that
        direction its logit grows faster than the mean of all logits. All arrows have one scale. A
        dot is a token, projected onto the plane, in the colour (and beyond 8 experts the shape) of
        its first choice. It differs from the region below it if the directions outside the plane
        decide. At most 3000 tokens are drawn, evenly spaced among all. Beyond 8 experts colours
        repeat, but never in neighbouring regions.

        Args:
            path: the file; its suffix sets the format. A missing folder is created.
            x: [..., H] floating, tokens to show. No tokens at all are the same as None.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is one expert, G is 1, or a value is not finite.
            RuntimeError: the shape, dtype or device of x does not fit.
        """
        try:
            from torchmoe.monitor._plane_figure import draw_plane
        except ImportError as error:
            raise missing("geometry", "plot", "matplotlib") from error
        experts, size = self.rows.shape
        if experts < 2:
            raise ValueError(f"geometry: plot must have two or more experts, got {experts}")
        if size < 2:
            raise ValueError(f"geometry: plot must have rows of two or more numbers, got {size}")
        if not (self.rows.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("geometry: plot must have finite rows and biases, got inf or NaN")
        tokens = None
        if x is not None:
            tokens = self._points(x)[0]
            if not tokens.isfinite().all():
                raise ValueError("geometry: plot must have finite x, got inf or NaN")
        figure = draw_plane(
            self.rows.cpu().numpy(),
            self.bias.cpu().numpy(),
            None if tokens is None or not len(tokens) else tokens.cpu().numpy(),
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    def __repr__(self) -> str:
        experts, size = self.rows.shape
        return f"{type(self).__name__}({experts} experts, rows of {size})"

    def _points(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """The points z [T, G] of tokens x [..., H], and the leading dimensions of x."""
        check_tensor("geometry", "x", x)
        hidden_size = self._hidden_size
        if x.dim() < 1 or (hidden_size is not None and x.shape[-1] != hidden_size):
            expected = "" if hidden_size is None else f" = [..., {hidden_size}]"
            raise RuntimeError(
                f"geometry: x must be [..., hidden_size]{expected}, got shape {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise RuntimeError(f"geometry: x must be floating, got {x.dtype}")
        if x.device != self.rows.device:
            raise RuntimeError(f"geometry: x must be on {self.rows.device}, got {x.device}")
        leading = x.shape[:-1]
        z = x.detach().to(torch.float64).reshape(leading.numel(), x.shape[-1])
        if self._project is not None:
            z = self._project(z)
        return z, leading

    def _logits_at(self, z: Tensor) -> Tensor:
        return torch.addmm(self.bias, z, self.rows.T)

    def _flips(self, logits: Tensor, top_k: int) -> Flips:
        """From logits [T, E]."""
        experts = logits.shape[1]
        choice = ops.select_experts(logits, top_k)  # [T, K]
        gaps = logits.gather(1, choice).unsqueeze(2) - logits.unsqueeze(1)  # [T, K, E]
        spans = self._spans[choice]  # [T, K, E]
        distances = (gaps / spans).masked_fill_(spans == 0, torch.inf)
        is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, choice, True)
        distances.masked_fill_(is_chosen.unsqueeze(1), torch.inf)
        pair = distances.flatten(1).argmin(1, keepdim=True)  # [T, 1], the first of equal ones
        distance = distances.flatten(1).gather(1, pair)
        chosen = choice.gather(1, pair // experts)
        unknown = ~distance.isfinite()
        return Flips(
            distance.squeeze(1),
            chosen.masked_fill(unknown, -1).squeeze(1),
            (pair % experts).masked_fill(unknown, -1).squeeze(1),
        )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|, from the differences themselves: 0 for equal rows, exact for similar ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

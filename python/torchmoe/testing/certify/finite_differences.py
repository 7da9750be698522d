"""A layer's gradient against finite differences, in the words of a law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torchmoe.testing._derivatives import Derivatives, check_derivatives
from torchmoe.testing._observation import UnstableSelectionError
from torchmoe.testing.certify.law import Answer, Difference, Gap

_DIRECTIONS = 2
_POINTS = 4
# The machine epsilon of a type whose steps are too coarse for a difference.
_COARSE = 1e-4

Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def against_differences(
    clause: str,
    function: Function,
    points: Callable[[int], Mapping[str, Tensor]],
    outputs: Sequence[str],
    role: Callable[[str], str],
    seed: int,
) -> Iterator[Answer]:
    """The gradients of all tensors of a role along random directions; see `check_derivatives`.

    Where a role's are wrong its tensors are looked at one by one.

    points: number -> tensors by name. Another point is taken where at one a choice of experts, a
    kink or rounding leaves a derivative unknown.
    """
    left: set[str] | None = None
    why, exact = "", True
    for number in range(_POINTS):
        point = points(number)
        groups = _Groups(point, role)
        try:
            found = _check(groups.function(function), groups.tensors, outputs, seed)
            wrong = {one.name for one in found.disagreements}
            for group in sorted(wrong):
                yield from _named(clause, group, function, point, groups, found, seed)
        except UnstableSelectionError as error:
            why = str(error)
            continue
        exact = found.dtype_eps < _COARSE
        undecided = {one.name for one in found.undecided}
        left = undecided if left is None else left & undecided
        if wrong or not left:
            return
        why = found.undecided[0].reason
    missing = "everything" if left is None else ", ".join(sorted(left))
    if not exact:
        why = "its values are rounded to 16 bits on the way"
    text = f"no difference says anything of {missing}: {why}"
    yield Gap(clause, text, could_be_asked=exact)


class _Groups:
    """Tensors of one role and dtype, as one vector each."""

    def __init__(self, point: Mapping[str, Tensor], role: Callable[[str], str]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in point.items()}
        self.names: dict[str, list[str]] = {}
        for name, tensor in point.items():
            kind = "" if tensor.dtype == torch.float64 else f" in {tensor.dtype}"
            self.names.setdefault(f"{role(name)}{kind}", []).append(name)
        self.tensors = {
            group: torch.cat([point[name].flatten() for name in names])
            for group, names in self.names.items()
        }

    def function(self, function: Function) -> Function:
        """The same function, of the vectors."""

        def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            apart: dict[str, Tensor] = {}
            for group, names in self.names.items():
                parts = torch.split(tensors[group], [self._shapes[name].numel() for name in names])
                for name, part in zip(names, parts, strict=True):
                    apart[name] = part.view(self._shapes[name])
            return function(apart)

        return grouped


def _named(
    clause: str,
    group: str,
    function: Function,
    point: Mapping[str, Tensor],
    groups: _Groups,
    found: Derivatives,
    seed: int,
) -> Iterator[Difference]:
    """Which tensors and entries of the role are wrong."""
    names = groups.names[group]
    alone = _check(
        lambda tensors: function({**point, **tensors}),
        {name: point[name] for name in names},
        found.outputs,
        seed,
    )
    # Without a tensor to blame, the direction in all of them is what is known.
    whole = [one for one in found.disagreements if one.name == group]
    for one in alone.disagreements or whole:
        entry = list(one.entry) if one.entry and alone.disagreements else ""
        yield Difference(
            f"{clause}, {group}",
            f"d {one.output}/d {one.name}{entry}",
            f"{one.expected:.8g}",
            f"{one.got:.8g}, for a {one.layout} incoming gradient",
        )


def _check(
    function: Function, tensors: Mapping[str, Tensor], outputs: Sequence[str], seed: int
) -> Derivatives:
    return check_derivatives(
        function,
        tensors,
        outputs=outputs,
        directions=_DIRECTIONS,
        blocks=0,
        entries=0,
        seed=seed,
    )

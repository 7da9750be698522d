"""Where a check of derivatives looks: directions in a tensor, in a part of it, in one entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """A direction in a range of a tensor's entries.

    Attributes:
        name: of the tensor.
        start: the flat number of the first entry.
        direction: [n], float64, of length 1, for the entries from `start` on.
    """

    name: str
    start: int
    direction: Tensor

    @property
    def stop(self) -> int:
        """The flat number after the last entry."""
        return self.start + self.direction.numel()

    def part(self, start: int, stop: int) -> Probe:
        """The direction in some of the entries, of length 1 again."""
        part = self.direction[start - self.start : stop - self.start]
        return Probe(self.name, start, part / part.norm())

    def indices(self, shape: torch.Size) -> tuple[int, ...]:
        """The indices that all of the entries have in common."""
        first, last = (
            [int(i) for i in torch.unravel_index(torch.tensor(end), shape)]
            for end in (self.start, self.stop - 1)
        )
        common = 0
        while common < len(shape) and first[common] == last[common]:
            common += 1
        return tuple(first[:common])


def draw_probes(
    name: str,
    tensor: Tensor,
    gradient: Tensor,
    numbers: tuple[int, int, int],
    generator: torch.Generator,
) -> list[Probe]:
    """Directions in the whole tensor, in indices of its first dimension, and single entries.

    Args:
        name: of the tensor.
        tensor: any shape.
        gradient: [n], one of its gradients: half of the entries are where it is largest.
        numbers: how many of each.
        generator: of the directions and of what is chosen.
    """
    directions, blocks, entries = numbers
    size = tensor.numel()
    if size == 0:
        return []
    probes = [_direction(name, 0, size, generator) for _ in range(directions)]
    rows = tensor.shape[0] if tensor.dim() >= 2 else 1
    if rows > 1:
        width = size // rows
        probes += [
            _direction(name, row * width, (row + 1) * width, generator)
            for row in _numbers(rows, blocks, generator)
        ]
    largest = gradient.abs().argsort(descending=True, stable=True)
    chosen = dict.fromkeys(largest[: entries // 2].tolist())
    chosen |= dict.fromkeys(_numbers(size, entries, generator))
    one = torch.ones(1, dtype=torch.float64)
    return probes + [Probe(name, entry, one) for entry in list(chosen)[:entries]]


def _numbers(size: int, count: int, generator: torch.Generator) -> list[int]:
    """Different random numbers in [0, size)."""
    drawn = torch.randint(size, (4 * count,), generator=generator).tolist()
    return list(dict.fromkeys(drawn))[:count]


def _direction(name: str, start: int, stop: int, generator: torch.Generator) -> Probe:
    drawn = torch.randn(stop - start, generator=generator, dtype=torch.float64)
    return Probe(name, start, drawn / drawn.norm())

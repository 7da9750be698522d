"""The errors of a step in bfloat16."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import LOOP, OURS, Shape, transformers_version
from benchmarks.cpu.rounding import RESULTS, errors, relative_error

# Of bfloat16's unit roundoff, 2**-8: each result is rounded to it once, by a third of that in the
# mean square, and a few roundings of what lies between come to it.
LEAST, MOST = 2**-8 / 8, 2**-8 * 2


def test_the_error_is_relative_to_what_is_expected() -> None:
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected.float(), expected) == 0


def test_every_contender_has_errors_of_bfloat16() -> None:
    peers = () if transformers_version() is None else ("grouped_mm", "eager")
    found = errors(Shape(64, 32, 48, 4, 2), peers)
    assert list(found) == [OURS, LOOP, *(f"transformers {name}" for name in peers)]
    for name, by_result in found.items():
        assert tuple(by_result) == RESULTS
        for result, error in by_result.items():
            assert LEAST < error < MOST, (name, result)

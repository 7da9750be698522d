"""Two runs are equal bit for bit, whatever the number of threads, and tokens do not mix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline import Layer
from situations import normal

THREADS = (1, 2, 3, 4, 8)

# Prime-ish sizes, so that no split into blocks or threads is even, and one with few rows.
SHAPES = [
    pytest.param((257, 61, 43, 7, 2, 60), id="many_tokens"),
    pytest.param((3, 130, 67, 5, 3, 2), id="few_tokens"),
    pytest.param((509, 32, 16, 31, 4, 40), id="many_experts"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_same_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    tokens, *sizes = shape
    layer = Layer.make(*sizes)
    x = normal(tokens, sizes[0], dtype=torch.float32)
    results = []
    for threads in (*THREADS, 2, 1):
        torch.set_num_threads(threads)
        results.append(layer.step(x))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


PROGRAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from pipeline import Layer
from situations import normal
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
layer = Layer.make(61, 43, 7, 2, 60)
step = layer.step(normal(257, 61, dtype=torch.float32))
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in step)).hexdigest())
"""


def test_two_processes_agree(pytestconfig: pytest.Config) -> None:
    """Another process has other addresses, so this sees order by pointer and stale memory."""
    folder = str(pytestconfig.rootpath / "tests" / "python")
    digests = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, folder, str(threads)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 3)
    }
    assert len(digests) == 1


def test_tokens_without_competition_do_not_see_each_other() -> None:
    """With room for all, a token's y does not depend on its batch, up to rounding."""
    layer = Layer.make(24, 16, 5, 2, 10_000)
    x = normal(40, 24, dtype=torch.float32)
    whole = layer.forward(x)
    atol = 4 * 25 * torch.finfo(torch.float32).eps * whole.abs().max().item()
    for count in (1, 3, 17):
        torch.testing.assert_close(layer.forward(x[:count]), whole[:count], rtol=0, atol=atol)
    shuffle = torch.randperm(40)
    torch.testing.assert_close(layer.forward(x[shuffle]), whole[shuffle], rtol=0, atol=atol)

"""The device that the tests of this folder run on.

They run under `pytest -m cuda` alone, and fail where there is no GPU. The option --cuda-device is
for rehearsals: with "cpu" and the emulated library (PYTHONPATH=build/emulation) everything runs but
what needs torch.cuda itself.

    pytest tests/python/cuda -m cuda --cuda-device cpu
"""

from __future__ import annotations

import os

import pytest
import torch

import on_device

# Read once by torch, when cuBLAS is first called: without it torch's deterministic mode, which
# fills new memory with NaN, refuses every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where the tests marked cuda run; cpu is a rehearsal on the emulated library",
    )


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device under test."""
    name = str(request.config.getoption("--cuda-device", default="cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail(
            "the tests marked cuda need a CUDA device, and torch.cuda.is_available() is false",
            pytrace=False,
        )
    name = "cuda:0" if name == "cuda" else name
    monkeypatch.setattr(on_device, "DEVICE", name)
    return name


@pytest.fixture
def real_device(device: str) -> torch.device:
    """For what the CPU has no counterpart of: streams, graphs, the allocator."""
    if device == "cpu":
        pytest.skip("a rehearsal on the CPU: this needs torch.cuda itself")
    return torch.device(device)

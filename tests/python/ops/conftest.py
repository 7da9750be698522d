"""Settings of the tests of the ops, whose kernels share their work between threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads(_same_start: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(_two_threads: None) -> None:
    """What is small waits for a second thread longer than it works."""
    torch.set_num_threads(1)

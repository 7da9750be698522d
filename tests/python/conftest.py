"""Settings shared by every Python test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Compiled code that another build left behind may call ops that no longer are: each run starts with
# a folder of its own for torch's caches, its subprocesses included.
_CACHES = tempfile.TemporaryDirectory(prefix="torchmoe-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHES.name

# These assert on behalf of the test files, so that their failures must show values as theirs do.
pytest.register_assert_rewrite(
    *("documents", "drawn", "gradient_harness", "lm_command_line", "lm_runs"),
    *("op_case", "op_harness", "refused", "stored", "watched"),
)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and one thread, and leaves no compiled code behind.

    What is small waits for a second thread longer than it works. The tests of the ops use two.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.compiler.reset()

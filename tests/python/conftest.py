"""Settings shared by every Python test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

# The caches of compiled code outlive a build: a graph found there may call the ops of another one.
# Their configuration may have read the environment already, which serves subprocesses.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
torch._inductor.config.force_disable_caches = True
torch._functorch.config.enable_autograd_cache = False

# The harness asserts on behalf of the test files, so its failures must show values as theirs do.
pytest.register_assert_rewrite("op_case", "op_harness", "gradient_harness")

NUM_THREADS = 2


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and one thread count, and leaves no compiled code behind."""
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(NUM_THREADS)
    torch.compiler.reset()

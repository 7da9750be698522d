"""A library without CUDA refuses CUDA tensors in one sentence, whatever the op."""

from __future__ import annotations

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet

import torchmoe
from op_case import by_position, overload
from situations import SITUATIONS, normal

pytestmark = pytest.mark.skipif(
    torchmoe.build_info()["cuda"] != "none", reason="the library has CUDA kernels"
)

PREFIX = "torchmoe::"
NAMES = sorted(
    name.removeprefix(PREFIX)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(PREFIX)
)


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_an_answer_to_cuda_tensors(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(PREFIX + name, "CUDA")


def test_the_answer_says_what_is_missing() -> None:
    """No GPU is needed to be asked as a CUDA tensor would ask."""
    situation = SITUATIONS["plain"]
    inputs = {"x": normal(situation.T, situation.H), **situation.plan()}
    arguments, _ = by_position("permute", inputs)
    message = r"^permute: tensors must be on the CPU, got CUDA tensors: .* without CUDA"
    with pytest.raises(RuntimeError, match=message):
        overload("permute").redispatch(DispatchKeySet(DispatchKey.CUDA), *arguments)

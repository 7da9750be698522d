"""Our function against the eager forward of every class of experts that transformers has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_case import assert_close, tolerance

pytest.importorskip("transformers", reason="needs transformers")

from integrations.transformers.experts_case import (
    CLASSES,
    OURS,
    E,
    H,
    I,
    K,
    T,
    exact,
    inputs_of,
    module_of,
    step,
    widened,
)
from torchmoe.integrations.transformers import supported
from torchmoe.integrations.transformers.catalogue import ExpertsClass

every_class = pytest.mark.parametrize("experts", CLASSES, ids=lambda experts: experts.name)

# The longest chain of sums: over H and I forward and backward, over tokens and slots.
LONGEST = 2 * (H + I) + H + T * K
# What our function rounds to a 16-bit type on the way: the pre-activation, the activation and,
# backward, their gradients and that of the output. Experts that are composed also round their
# rows, the two factors of the gate and the norm, each forward and backward.
ROUNDINGS, COMPOSED_ROUNDINGS = 4, 12
# The eager forward rounds both factors of the gate and their product, the rows, their products
# with the weights and each of their K sums, and as often backward.
EAGER_ROUNDINGS = 2 * (6 + K)


def assert_all_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, roundings: int
) -> None:
    """Each tensor within the error of its sums, in float32 or wider, and of its roundings."""
    assert actual.keys() == expected.keys()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in expected.items():
        assert actual[name].isfinite().all(), name
        atol = tolerance(value, n=LONGEST, wide=wide, stored=dtype, roundings=roundings)
        assert_close(actual[name], value, atol)


def test_there_are_classes() -> None:
    assert len(CLASSES) >= 60


@every_class
def test_no_class_is_refused(experts: ExpertsClass) -> None:
    composed = experts.name == "MuseSparkExperts"
    assert supported(module_of(experts)) == ("composed" if composed else "fused")


@every_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(experts: ExpertsClass, dtype: torch.dtype) -> None:
    module = module_of(experts, dtype)
    inputs = inputs_of(module)
    own = COMPOSED_ROUNDINGS if supported(module) == "composed" else ROUNDINGS
    expected = exact(module, inputs)
    if dtype == torch.float64:
        with widened():  # a composed one calls the class's own norm
            ours = step(module, inputs, OURS)
    else:
        ours = step(module, inputs, OURS)
        eager = step(module, inputs, "eager")
        assert {name: t.dtype for name, t in ours.items()} == {
            name: t.dtype for name, t in eager.items()
        }
        assert_all_close(ours, eager, dtype, own + EAGER_ROUNDINGS)
    assert_all_close(ours, expected, dtype, own)
    unrouted = inputs.top_k_index == E
    assert ours["top_k_weights"][unrouted].count_nonzero() == 0
    assert ours["y"][2].count_nonzero() == 0
    matrices = [value for name, value in ours.items() if name.startswith(("gate", "up", "down"))]
    assert len(matrices) >= 2
    assert all(matrix[3].count_nonzero() == 0 for matrix in matrices)


@pytest.mark.parametrize("name", ["AriaExperts", "GptOssExperts", "MixtralExperts"])
@pytest.mark.parametrize("intermediate_size", [H, H // 2])
def test_square_matrices(name: str, intermediate_size: int) -> None:
    """Their shapes do not tell how they are stored."""
    module = module_of(name, intermediate_size=intermediate_size)
    inputs = inputs_of(module)
    assert_all_close(step(module, inputs, OURS), exact(module, inputs), torch.float64, 0)

"""Sizes that occur in training, and those past 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from on_device import forward_backward, moved, on_device, op_tests, prepared
from op_case import Inputs, OpCase, Outputs, assert_close, id_names, tolerance, wide_dtype
from situations import Situation
from torchmoe import ops

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

LARGE = (
    Situation("many_rows", routing="dropped", T=2000, H=192, I=96, E=64, K=8),
    # Whole tiles and vectors of 16 bytes.
    Situation("even", T=1024, H=256, I=128, E=8, K=2),
    Situation("odd", routing="dropped", T=777, H=129, I=67, E=13, K=3),
    # More experts than a block has threads.
    Situation("many_experts", routing="dropped", T=300, H=40, I=24, E=1100, K=12),
    Situation("one_expert", routing="one_expert", T=3000, H=72, I=200, E=5, K=1),
)

CASES = {tests.case.name: tests.case for tests in op_tests()}
CHOSEN = [
    pytest.param(case, variant, dtype, id=f"{case.name}-{id_names([variant])[0]}-{dtype}")
    for case in CASES.values()
    for variant in case.variants
    for dtype in (torch.float32, torch.bfloat16, torch.int64)
    if dtype in case.dtypes
]


def wide_results(case: OpCase, inputs: Inputs, names: tuple[str, ...], given: Outputs) -> Outputs:
    """Outputs and gradients of the CPU op in float64, itself checked against the reference."""
    wide = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in inputs.items()
    }
    given = tuple(g.cpu().double() for g in given)
    return forward_backward(case, wide, names, given)


@pytest.mark.parametrize("situation", LARGE, ids=id_names(LARGE))
@pytest.mark.parametrize(("case", "variant", "dtype"), CHOSEN)
def test_the_cpu_ops_results(
    case: OpCase, variant: Inputs, dtype: torch.dtype, situation: Situation
) -> None:
    inputs = case.make(situation, dtype, **variant)
    there = moved(inputs)
    function, names, given = prepared(case, there)
    actual = forward_backward(function, there, names, given)
    expected = wide_results(case, inputs, names, given)
    integers = case(inputs)
    case = on_device(case)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not a.is_floating_point():
            assert torch.equal(a.cpu(), integers[i])
            continue
        is_gradient = i >= len(integers)
        atol = tolerance(
            e,
            n=situation.longest,
            wide=wide_dtype(dtype),
            stored=dtype if is_gradient else a.dtype,
            roundings=case.gradient_roundings if is_gradient else case.roundings,
        )
        assert_close(a.cpu(), e, atol)


# Rows of H 16-bit elements, the last 1024 of them past the 2^31st element.
H, K, E = 8192, 8, 8
ROWS = 2**31 // H + 1024
TOKENS = ROWS // K
SAMPLE = (0, 1, 2**31 // H - 1, 2**31 // H, 2**31 // H + 1, ROWS - 2, ROWS - 1)
SAMPLED_TOKENS = (0, 1, TOKENS // 2, TOKENS - 2, TOKENS - 1)
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def _room(real_device: torch.device) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(real_device)[0]
    needed = 6 * 2 * ROWS * H
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def plan() -> ops.DispatchPlan:
    """Some slots are not routed, and their rows lie at the end."""
    return ops.dispatch_plan(torch.randint(-1, E, (TOKENS, K), device="cuda"), E)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """Sums of a few terms, formed in float32 and rounded once."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=2 * EPS * scale)


@pytest.mark.usefixtures("_room")
def test_permute_past_2_to_the_31() -> None:
    p = plan()
    x = drawn(TOKENS, H).requires_grad_()
    rows = ops.permute(x, p)
    assert rows.numel() > 2**31
    routed = int(p.expert_offsets[-1])
    for row in (*SAMPLE, routed - 1, routed):
        expected = x[p.row_to_slot[row] // K] if row < routed else torch.zeros_like(x[0])
        assert torch.equal(rows[row], expected)
    del rows
    grad = drawn(ROWS, H)
    (grad_x,) = torch.autograd.grad(ops.permute(x, p), x, grad)
    for token in SAMPLED_TOKENS:
        own = p.slot_to_row[token]
        assert_rounded(grad_x[token], grad[own[own < routed]].float().sum(0))


@pytest.mark.usefixtures("_room")
def test_unpermute_past_2_to_the_31() -> None:
    p = plan()
    rows = drawn(ROWS, H).requires_grad_()
    weights = torch.rand(TOKENS, K, device="cuda").requires_grad_()
    routed = int(p.expert_offsets[-1])
    y = ops.unpermute(rows, weights, p)
    for token in SAMPLED_TOKENS:
        own = p.slot_to_row[token]
        kept = own < routed
        expected = (weights[token][kept].unsqueeze(1) * rows[own[kept]].float()).sum(0)
        assert_rounded(y[token].detach(), expected.detach())
    grad = drawn(TOKENS, H)
    grad_rows, grad_weights = torch.autograd.grad(y, [rows, weights], grad)
    for row in (*SAMPLE, routed - 1, routed):
        slot = int(p.row_to_slot[row])
        if row >= routed:
            assert bool((grad_rows[row] == 0).all())
            assert grad_weights.flatten()[slot] == 0
            continue
        token_grad = grad[slot // K].float()
        assert_rounded(grad_rows[row], (weights.flatten()[slot] * token_grad).detach())
        expected = (token_grad.double() * rows.detach()[row].double()).sum()
        atol = 4 * H * torch.finfo(torch.float32).eps * max(1.0, abs(float(expected)))
        assert abs(float(grad_weights.flatten()[slot]) - float(expected)) <= atol


@pytest.mark.usefixtures("_room")
def test_grouped_linear_past_2_to_the_31() -> None:
    width = 64
    offsets = plan().expert_offsets
    routed = int(offsets[-1])
    rows, weight = drawn(ROWS, width).requires_grad_(), drawn(E, H, width).requires_grad_()
    y = ops.grouped_linear(rows, weight, None, offsets)
    assert y.numel() > 2**31
    experts = torch.bucketize(torch.arange(ROWS, device="cuda"), offsets[1:], right=True)
    for row in (*SAMPLE, routed - 1, routed):
        if row >= routed:
            assert bool((y[row] == 0).all())
            continue
        expected = weight[experts[row]].float() @ rows[row].float()
        assert_rounded(y[row].detach(), expected.detach())
    grad = drawn(ROWS, H)
    grad_rows, grad_weight = torch.autograd.grad(y, [rows, weight], grad)
    for row in (*SAMPLE, routed - 1):
        if row < routed:
            expected = grad[row].float() @ weight[experts[row]].float()
            assert_rounded(grad_rows[row], expected.detach())
    # The last expert's rows reach past the 2^31st element of the gradient.
    begin, end = int(offsets[-2]), routed
    expected = grad[begin:end].float().t() @ rows[begin:end].float()
    assert_rounded(grad_weight[-1], expected.detach())

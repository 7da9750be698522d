"""What torch's FlopCounterMode counts, compared with totals computed by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torchmoe import ops
from torchmoe.nn import CosineRouter, ExpertList, Experts, Gate, MoE

T, H, INNER, E, K = 7, 6, 5, 4, 2
ROUTER = 2 * T * H * E
GATED = 6 * T * K * H * INNER
PLAIN = 4 * T * K * H * INNER


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def step(layer: nn.Module, x: Tensor) -> None:
    output = layer(x)
    (output.hidden_states.square().sum() + output.aux_loss).backward()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "experts"), [("swiglu", GATED), ("relu", PLAIN)])
def test_layer(activation: str, experts: int, bias: bool) -> None:
    layer = MoE(H, INNER, E, K, activation=activation, bias=bias)
    x = torch.randn(T, H, requires_grad=True)
    assert counted(lambda: layer(x)) == ROUTER + experts
    for without_gradient in (torch.no_grad, torch.inference_mode):
        with without_gradient():
            assert counted(lambda: layer(torch.randn(T, H))) == ROUTER + experts
    assert counted(lambda: step(layer, x)) == 3 * (ROUTER + experts)


def test_first_layer_of_a_model_pays_no_gradient_of_its_input() -> None:
    layer = MoE(H, INNER, E, K)
    # Of the products with w_in, two thirds of a gated layer, half of the backward pass is left out.
    expected = 3 * (ROUTER + GATED) - ROUTER - 2 * T * K * H * (2 * INNER)
    assert counted(lambda: step(layer, torch.randn(T, H))) == expected


def test_frozen_parts_pay_no_gradient() -> None:
    layer = MoE(H, INNER, E, K)
    layer.experts.down_proj.requires_grad_(False)
    layer.router.requires_grad_(False)
    x = torch.randn(T, H, requires_grad=True)
    # The router still passes a gradient on to x.
    expected = 2 * ROUTER + 3 * GATED - 2 * T * K * H * INNER
    assert counted(lambda: step(layer, x)) == expected


def test_dense_gradient() -> None:
    layer = MoE(H, INNER, E, K, gate=Gate(estimator="straight_through_dense"))
    x = torch.randn(T, H, requires_grad=True)
    assert counted(lambda: layer(x)) == ROUTER + GATED
    assert counted(lambda: step(layer, x)) == 3 * (ROUTER + GATED) + 6 * T * E * H * INNER


def test_checkpointing_counts_the_recomputation() -> None:
    layer = MoE(H, INNER, E, K)
    x = torch.randn(T, H, requires_grad=True)

    def hidden_states(x: Tensor) -> Tensor:
        return layer(x).hidden_states

    def checkpointed() -> None:
        checkpoint(hidden_states, x, use_reentrant=False).sum().backward()

    assert counted(checkpointed) == 4 * (ROUTER + GATED)


def test_expert_list_counts_what_its_modules_count() -> None:
    experts = ExpertList([nn.Linear(H, H) for _ in range(E)])
    layer = MoE(H, None, E, K, experts=experts)
    x = torch.randn(T, H, requires_grad=True)
    assert counted(lambda: layer(x)) == ROUTER + 2 * T * K * H * H
    assert counted(lambda: step(layer, x)) == 3 * (ROUTER + 2 * T * K * H * H)


def test_grouped_linear() -> None:
    rows = torch.randn(T * K, H, requires_grad=True)
    weight = torch.randn(E, INNER, H, requires_grad=True)
    bias = torch.randn(E, INNER)
    plan = ops.dispatch_plan(torch.randint(E, (T, K)), E)
    one = 2 * T * K * H * INNER

    def run(rows: Tensor, weight: Tensor) -> Tensor:
        return ops.grouped_linear(rows, weight, bias, plan.expert_offsets)

    assert counted(lambda: run(rows, weight)) == one
    assert counted(lambda: run(rows, weight).sum().backward()) == 3 * one
    assert counted(lambda: run(rows.detach(), weight).sum().backward()) == 2 * one


def test_grouped_mlp() -> None:
    rows = torch.randn(T * K, H)
    w_in, w_out = torch.randn(E, 2 * INNER, H), torch.randn(E, H, INNER, requires_grad=True)
    plan = ops.dispatch_plan(torch.randint(E, (T, K)), E)

    def run(w_in: Tensor, w_out: Tensor) -> Tensor:
        return ops.grouped_mlp(rows, w_in, None, w_out, None, plan.expert_offsets, "swiglu")

    assert counted(lambda: run(w_in, w_out.detach())) == GATED
    # Backward: the gradient at the activation, and that of w_out.
    expected = GATED + 2 * (2 * T * K * H * INNER)
    assert counted(lambda: run(w_in, w_out).sum().backward()) == expected


def test_cosine_router() -> None:
    # x is projected to 3 dimensions, which are then compared with the experts' directions.
    router = CosineRouter(H, E, projection_size=3)
    x = torch.randn(T, H)
    assert counted(lambda: router(x)) == 2 * T * H * 3 + 2 * T * 3 * E


def test_every_slot_counts() -> None:
    experts = Experts(H, INNER, E)
    dropped = torch.full((T, K), -1)
    assert counted(lambda: experts(torch.randn(T, H), dropped, torch.ones(T, K))) == GATED


def test_counts_by_module() -> None:
    model = nn.Sequential(nn.Linear(H, H), MoE(H, INNER, E, K))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, H))
    by_module = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    assert by_module["Sequential.1.router"] == ROUTER
    assert by_module["Sequential.1.experts"] == GATED
    assert by_module["Sequential.1"] == ROUTER + GATED


COUNT = """
x = torch.randn(7, 6)
with FlopCounterMode(display=False) as counter:
    torchmoe.nn.MoE(6, 5, 4, 2)(x)
assert counter.get_total_flops() == 2 * 7 * 6 * 4 + 6 * 7 * 2 * 6 * 5, counter.get_flop_counts()
"""
COUNTER = "from torch.utils.flop_counter import FlopCounterMode\n"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            "import sys, torch, torchmoe\n"
            "assert 'torch.utils.flop_counter' not in sys.modules\n" + COUNTER + COUNT,
            id="counter_after",
        ),
        pytest.param("import torch\n" + COUNTER + "import torchmoe\n" + COUNT, id="counter_before"),
        pytest.param(
            "import importlib, torch, torchmoe, torch.utils.flop_counter\n"
            "importlib.reload(torch.utils.flop_counter)\n" + COUNTER + COUNT,
            id="counter_again",
        ),
        pytest.param(
            "import importlib, torch, torchmoe\n"
            "importlib.reload(torchmoe)\n" + COUNTER + "importlib.reload(torchmoe)\n" + COUNT,
            id="library_again",
        ),
    ],
)
def test_whichever_is_imported_first(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)

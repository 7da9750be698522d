"""Assistance as a module, and what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assisted_layers import F64, INNER, RING, SLOTS, E, H, K, T, make
from compiled_once import check_compiled_once
from torchmoe.nn import Assistance, Capacity, Gate, MoE, Router, Routing

# --- as a module --------------------------------------------------------------------------------


def test_compiles_once_whatever_the_state() -> None:
    moe = make(capacity=Capacity(1.1), dtype=torch.float32)
    assisted: tuple[list[int], ...] = ([], [0], [1, 2, 3])

    def assist(turn: int) -> None:
        moe.assistance.assisted.zero_()
        moe.assistance.assisted[assisted[turn]] = True

    def check_slots(turn: int, routing: Routing) -> None:
        assert bool((routing.selected[:, K] >= 0).any()) == bool(assisted[turn])

    check_compiled_once(moe, H, before=assist, after=check_slots)


def test_state_dict_copies_and_reset() -> None:
    moe = make([1, 3])
    moe.assistance.updates_above[2] = 7
    names = {name for name in moe.state_dict() if name.startswith("assistance")}
    assert names == {"assistance.assisted", "assistance.updates_above"}
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(moe)):
        assert torch.equal(other.assistance.assisted, moe.assistance.assisted)
        assert torch.equal(other.assistance.updates_above, moe.assistance.updates_above)
        other.assistance.assisted.zero_()
    assert moe.assistance.assisted.sum() == 2
    moe.bfloat16()
    assert moe.assistance.assisted.dtype == torch.float32
    assert moe.assistance.updates_above.dtype == torch.float32
    moe.reset_parameters()
    assert not moe.assistance.assisted.any()
    assert not moe.assistance.updates_above.any()


def test_meta_device() -> None:
    moe = make(device="meta")
    assert all(buffer.is_meta for buffer in moe.buffers())
    assert moe(torch.empty(T, H, device="meta", dtype=F64)).routing.indices.shape == (T, K + 1)
    with torch.device("meta"):
        moe = MoE(H, INNER, E, K, assistance=Assistance(RING))
    moe = moe.to_empty(device="cpu")
    for buffer in moe.buffers():
        buffer.fill_(1)
    moe.reset_parameters()
    assert not moe.assistance.assisted.any()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backup": (0, 0)},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 0 for expert 0",
        ),
        (
            {"backup": (1, 2)},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got 2 for expert 1",
        ),
        (
            {"backup": (-1, 0)},
            ValueError,
            r"backup must be another expert in \[0, 2\) for every expert, got -1 for expert 0",
        ),
        ({"backup": (1.0, 0)}, TypeError, r"backup must be an int, got 1.0"),
        (
            {"lower_threshold": 2.5},
            ValueError,
            r"lower_threshold must be in \(0, threshold\] = \(0, 2.0\], got 2.5",
        ),
        (
            {"lower_threshold": 0.0},
            ValueError,
            r"lower_threshold must be in \(0, threshold\] = \(0, 2.0\], got 0.0",
        ),
        *[
            (
                {"threshold": threshold},
                ValueError,
                r"threshold must be in \(0, 3\), up to the load of an expert that gets every slot, "
                f"got {threshold}",
            )
            for threshold in (-1.0, 0.0, 3.0, 4, float("nan"), float("inf"))
        ],
        ({"patience": 0}, ValueError, r"patience must be >= 1, got 0"),
        ({"patience": 2.5}, TypeError, r"patience must be an int, got 2.5"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Assistance: {message}$"):
        Assistance(**({"backup": (1, 2, 0)} | options))


class Logits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :E]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"assistance": RING},
            TypeError,
            r"assistance must be an Assistance or None, got \(1, 2, 3, 4, 0\)",
        ),
        (
            {"assistance": Assistance((1, 0))},
            ValueError,
            r"assistance must have num_experts 5, got 2",
        ),
        *[
            (
                {"router": router},
                ValueError,
                r"router must keep usage for assistance, as Router\(track_usage=True\) does, "
                r"got \w+ without",
            )
            for router in (Router(H, E), Logits())
        ],
    ],
)
def test_layer_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^MoE: {message}$"):
        MoE(H, INNER, E, K, **({"assistance": Assistance(RING)} | options))


def test_a_router_that_keeps_usage_will_do() -> None:
    for router in (Router(H, E, track_usage=True), Router(H, E, usage_scaling=True)):
        assert MoE(H, INNER, E, K, assistance=Assistance(RING), router=router).router is router
    assert MoE(H, INNER, E, K, assistance=Assistance(RING)).router.usage is not None
    assert MoE(H, INNER, E, K).router.usage is None


def test_padding_is_no_sustained_load() -> None:
    """A step without a counted token neither begins nor ends assistance, nor brings it nearer."""
    assistance = Assistance((1, 0), threshold=1.5, lower_threshold=1.0, patience=2)
    high, low, nothing = torch.tensor([0.8, 0.2]), torch.tensor([0.4, 0.6]), torch.tensor(0)
    assistance.update(high, SLOTS)
    assistance.update(high, nothing)
    assert assistance.updates_above.tolist() == [1, 0]
    assert not assistance.assisted.any()
    assistance.update(high, SLOTS)
    assistance.update(low, nothing)
    assert assistance.assisted.tolist() == [True, False]


def test_a_single_choice_needs_weights_that_vary() -> None:
    """Without a helper, which comes and goes, the router would learn nothing."""
    with pytest.raises(ValueError, match=r'^MoE: gate.normalize must be "none" .*, got "topk"$'):
        MoE(H, INNER, E, 1, assistance=Assistance(RING), gate=Gate(normalize="topk"))
    MoE(H, INNER, E, 1, assistance=Assistance(RING))
    gate = Gate(normalize="topk", estimator="straight_through")
    MoE(H, INNER, E, 1, assistance=Assistance(RING), gate=gate)

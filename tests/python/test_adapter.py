"""How foreign layers are read."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from torchmoe import Adapter
from torchmoe.nn import MoE

T, H, E, K = 5, 6, 4, 2
Y, LOSS = torch.randn(T, H), torch.tensor(0.1)
LOGITS, IDS, WEIGHTS = torch.randn(T, E), torch.zeros(T, K, dtype=torch.int64), torch.rand(T, K)


class Record(NamedTuple):
    router_logits: Tensor
    output: Tensor
    aux_loss: Tensor


@dataclasses.dataclass
class Data:
    y: Tensor
    loss: Tensor


class Layer(nn.Module):
    """Returns what it is given."""

    def __init__(self, result: Any, **attributes: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))
        self.result, self.attributes = result, attributes

    def forward(self, x: Tensor) -> Any:
        self.gate(x)
        for name, value in self.attributes.items():
            setattr(self, name, value)
        return self.result


@pytest.mark.parametrize(
    ("result", "loss"),
    [
        (Y, None),
        ((Y, LOSS), LOSS),
        ((Y, LOGITS), None),
        ([Y, LOSS, LOGITS], LOSS),
        (Record(LOGITS, Y, LOSS), LOSS),
        (Data(Y, LOSS), LOSS),
        ({"hidden_states": Y, "aux_loss": LOSS}, LOSS),
        ({"last_hidden_state": Y, "router_logits": LOGITS}, None),
    ],
)
def test_what_layers_return(result: Any, loss: Tensor | None) -> None:
    reading = Adapter().call(Layer(result), torch.randn(T, H))
    assert reading.hidden_states is Y
    assert reading.aux_loss is loss
    assert reading.logits is not None
    assert reading.logits.shape == (T, E)


def test_ids_and_weights_by_their_shape() -> None:
    reading = Adapter().call(Layer((Y, WEIGHTS, IDS)), torch.randn(T, H))
    assert torch.equal(reading.weights, WEIGHTS)
    assert torch.equal(reading.indices, IDS)


def test_a_router_that_returns_all() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return LOGITS, WEIGHTS, IDS

    layer = Layer(Y)
    layer.gate = Router()
    reading = Adapter(num_experts=E).call(layer, torch.randn(T, H))
    assert torch.equal(reading.logits, LOGITS)
    assert torch.equal(reading.weights, WEIGHTS)
    assert torch.equal(reading.indices, IDS)


@pytest.mark.parametrize("name", ["aux_loss", "l_aux"])
def test_a_loss_that_is_kept(name: str) -> None:
    assert Adapter().call(Layer(Y, **{name: LOSS}), torch.randn(T, H)).aux_loss is LOSS


def test_what_is_told_comes_first() -> None:
    layer = Layer((Y, LOGITS), balance=LOSS)
    told = Adapter(aux_loss="balance", logits=lambda layer, result: result[1] + 1)
    reading = told.call(layer, torch.randn(T, H))
    assert reading.aux_loss is LOSS
    assert torch.equal(reading.logits, LOGITS + 1)
    assert Adapter(aux_loss="gate.weight").call(layer, torch.randn(T, H)).aux_loss is not None


def test_our_layer() -> None:
    moe = MoE(H, 5, E, K)
    x = torch.randn(2, 3, H)
    reading, output = Adapter().call(moe, x), moe(x)
    assert torch.equal(reading.hidden_states, output.hidden_states)
    assert torch.equal(reading.aux_loss, output.aux_loss)
    for name in ("logits", "indices", "weights"):
        assert torch.equal(getattr(reading, name), getattr(output.routing, name))


def test_sizes_parts_and_roles() -> None:
    adapter, layer = Adapter(), Layer(Y)
    assert (adapter.size(layer), adapter.expert_count(layer), adapter.slots(layer)) == (H, E, None)
    assert adapter.role(layer, "gate.weight") == "router"
    assert adapter.role(layer, "experts.2.weight") == "experts"
    assert adapter.role(layer, "norm.weight") == "layer"
    assert adapter.router_weight(layer) == "gate.weight"
    told = Adapter(router="experts.0", experts="gate", hidden_size=9, num_experts=7, top_k=3)
    assert (told.size(layer), told.expert_count(layer), told.slots(layer)) == (9, 7, 3)
    assert told.role(layer, "gate.weight") == "experts"


def test_nothing_that_is_an_output() -> None:
    with pytest.raises(TypeError, match="Adapter: hidden_states must be found in what the layer"):
        Adapter().call(Layer("y"), torch.randn(T, H))
    with pytest.raises(TypeError, match=r"Adapter.call: layer must be a module"):
        Adapter().call(len, torch.randn(T, H))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"aux_loss": 3}, TypeError, "aux_loss must be a name or a function, got 3"),
        ({"router": nn.Linear(2, 2)}, TypeError, "router must be a string, got Linear"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"per_token": "no"}, TypeError, "per_token must be True or False, got 'no'"),
        ({"reference": 1}, TypeError, "reference must be a function, got 1"),
        ({"update": "now"}, TypeError, "update must be a function, got 'now'"),
        ({"without_gradient": "experts"}, TypeError, "without_gradient must be a tuple of strings"),
    ],
)
def test_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Adapter: {message}"):
        Adapter(**arguments)

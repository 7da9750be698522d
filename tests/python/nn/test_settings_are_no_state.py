"""Settings that are tables survive whatever a framework does to a model's tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchmoe.nn import Assistance, Capacity, HashRouter, MoE

T, H, INNER, E, K = 40, 8, 6, 6, 2
RING = (1, 2, 3, 4, 5, 0)

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "hash": lambda: {"router": HashRouter(E, K, seed=7)},
    "backup": lambda: {"capacity": Capacity(0.8, overflow="backup", backup=RING)},
    "assistance": lambda: {"assistance": Assistance(RING)},
}


class Model(nn.Module):
    """A layer between others, as in anybody's model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, INNER, E, K, **OPTIONS[name]())

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = (torch.arange(T) * 37 + 11) if self.name == "hash" else None
        output = self.moe(self.norm(x), router_input=ids)
        return output.hidden_states, output.routing.indices


def trained(name: str) -> Model:
    model = Model(name)
    with torch.no_grad():
        if name != "hash":
            model.moe.router.weight[0] *= 3  # so that an expert overflows
        if name == "assistance":
            model.moe.assistance.assisted.fill_(True)
    return model


def assert_routes_alike(actual: Any, expected: Model, x: Tensor) -> None:
    y, indices = actual.routed(x)
    assert torch.equal(indices, expected.routed(x)[1])
    torch.testing.assert_close(y, expected.routed(x)[0])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, H) + 0.5


names = pytest.mark.parametrize("name", list(OPTIONS))


@names
def test_no_table_is_in_the_state(name: str) -> None:
    model = Model(name)
    integers = {n for n, b in model.named_buffers() if b.dtype == torch.int64}
    assert integers <= {"moe.assistance.updates_above"}


@names
def test_to_empty_and_filling_the_state(name: str, x: Tensor) -> None:
    model = trained(name)
    with torch.device("meta"):
        empty = Model(name)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(1)
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in empty.state_dict().items():
            tensor.copy_(state[key])
    assert_routes_alike(empty, model, x)


@names
def test_loading_by_assignment_into_a_layer_on_the_meta_device(name: str, x: Tensor) -> None:
    model = trained(name)
    with torch.device("meta"):
        empty = Model(name)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_routes_alike(empty, model, x)
    moved = Model(name).to("meta")
    moved.load_state_dict(model.state_dict(), assign=True)
    assert_routes_alike(moved, model, x)


@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.9), None])
@pytest.mark.parametrize("name", ["hash", "backup"])
def test_averaged_models(name: str, average: Any, x: Tensor) -> None:
    """With buffers, which integers that count would not survive."""
    model = trained(name)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(model)
    assert_routes_alike(averaged.module, model, x)


@names
def test_from_pretrained(name: str, x: Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "torchmoe_test"
        layer_name = name

    class Pretrained(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Model(name)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Everything is loaded."""

        def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.routed(x)

    original = Pretrained(Config())
    original.model.load_state_dict(trained(name).state_dict())
    original.save_pretrained(tmp_path)
    loaded = Pretrained.from_pretrained(tmp_path)
    assert_routes_alike(loaded, original.model, x)


@names
def test_copies(name: str, x: Tensor) -> None:
    model = trained(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert_routes_alike(other, model, x)


@names
def test_devices_and_modes(name: str, x: Tensor) -> None:
    model = trained(name)
    on_meta = copy.deepcopy(model).to("meta")
    if name != "hash":
        assert on_meta(x.to("meta")).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == x.shape
    assert_routes_alike(model, trained_like(model), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def trained_like(model: Model) -> Model:
    other = Model(model.name)
    other.load_state_dict(model.state_dict())
    return other

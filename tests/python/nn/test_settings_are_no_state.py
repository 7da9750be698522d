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
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchmoe.nn import Assistance, Capacity, HashRouter, MoE

T, H, INNER, E, K = 40, 8, 6, 6, 2
RING = (1, 2, 3, 4, 5, 0)

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "hash": lambda: {"router": HashRouter(E, K, seed=7)},
    "backup": lambda: {"capacity": Capacity(0.6, overflow="backup", backup=RING)},
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
    assert all(buffer.is_floating_point() for buffer in Model(name).buffers())


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
@names
def test_averaged_models(name: str, average: Any, x: Tensor) -> None:
    """With buffers."""
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


@names
def test_fake_tensors_leave_nothing_behind(name: str, x: Tensor) -> None:
    model = trained(name)
    values = model.state_dict()
    expected = model.routed(x)[1]
    with FakeTensorMode() as mode:
        lent = {key: mode.from_tensor(value) for key, value in values.items()}
        assert torch.func.functional_call(model, lent, mode.from_tensor(x)).shape == x.shape
        fake = Model(name)  # every tensor of it is one
    assert torch.equal(model.routed(x)[1], expected)
    fake.load_state_dict(values, assign=True)
    assert torch.equal(fake.routed(x)[1], expected)


@names
def test_a_first_pass_in_inference_mode(name: str, x: Tensor) -> None:
    """What it keeps is of use to a pass with gradients, compiled or not."""
    with torch.device("meta"):
        model = Model(name)
    model.load_state_dict(trained(name).state_dict(), assign=True)
    with torch.inference_mode():
        expected = model.routed(x)[1]
    model(x).sum().backward()
    compiled = torch.compile(model.routed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[1], expected)


@names
def test_one_graph_serves_every_setting(name: str, x: Tensor) -> None:
    torch._dynamo.reset()
    other_ring = tuple(reversed(range(E)))
    others = {
        "hash": lambda: {"router": HashRouter(E, K, seed=8)},
        "backup": lambda: {"capacity": Capacity(0.6, overflow="backup", backup=other_ring)},
        "assistance": lambda: {"assistance": Assistance(other_ring)},
    }
    one, other = trained(name), trained(name)
    other.moe = MoE(H, INNER, E, K, **others[name]())
    other.load_state_dict(one.state_dict())
    expected = [model.routed(x)[1] for model in (one, other)]
    assert not torch.equal(*expected)
    counter = CompileCounter()
    compiled = torch.compile(lambda model, x: model.routed(x)[1], backend=counter, fullgraph=True)
    for _ in range(2):
        for model, indices in zip((one, other), expected, strict=True):
            assert torch.equal(compiled(model, x), indices)
    assert counter.frame_count == 1


@names
@pytest.mark.parametrize("strict", [False, True])
def test_export(name: str, strict: bool, x: Tensor) -> None:
    model = trained(name).eval()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def trained_like(model: Model) -> Model:
    other = Model(model.name)
    other.load_state_dict(model.state_dict())
    return other

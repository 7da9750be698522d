"""The C++ layer and the Python layer give the same bits, with parameters carried across both ways.

The C++ side is the program tests/cpp/nn/parity.cpp: a request goes to it as a dict of tensors and
settings, and its outputs, routing, losses and gradients come back.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchmoe
from float_types import FLOATS
from torchmoe.ops import ACTIVATIONS

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "tests" / "cpp" / "torchmoe_parity"
SEED = 7
SHAPE = (2, 13)
HIDDEN, INTERMEDIATE, EXPERTS = 24, 20, 6

SETTINGS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "top_k": 2,
    "activation": "swiglu",
    "bias": False,
    "router_bias": False,
    "input_jitter": 0.0,
    "logit_noise": 0.0,
    "score_function": "softmax",
    "normalize": None,
    "estimator": "exact",
    "capacity_factor": None,
    "capacity_eval_factor": None,
    "capacity_minimum": 0,
    "capacity_order": "choice",
    "capacity_overflow": "drop",
    "capacity_backup": None,
    "capacity_normalize": "before_drop",
    "balance_weight": 0.01,
    "z_loss_weight": 0.0,
}


@dataclass
class Case:
    """A layer and how it is run."""

    name: str
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    masked: bool = False
    train: bool = True


CASES = [
    Case("plain", {}),
    *(Case(activation, {"activation": activation, "bias": True}) for activation in ACTIVATIONS),
    Case("router_bias", {"router_bias": True, "z_loss_weight": 0.001, "balance_weight": 0.1}),
    Case("sigmoid", {"score_function": "sigmoid", "z_loss_weight": 0.1}),
    Case("unnormalized", {"normalize": "none", "top_k": 3}),
    Case("one_expert", {"top_k": 1}),
    Case("every_expert", {"top_k": EXPERTS}),
    Case("straight_through", {"estimator": "straight_through"}),
    Case(
        "straight_through_one_expert",
        {"estimator": "straight_through", "top_k": 1, "normalize": "topk"},
    ),
    Case(
        "uniform", {"estimator": "straight_through", "normalize": "uniform", "capacity_factor": 0.5}
    ),
    Case("choice_order", {"capacity_factor": 0.7}),
    Case("token_order", {"capacity_factor": 0.7, "capacity_order": "token"}),
    Case("after_drop", {"capacity_factor": 0.7, "capacity_normalize": "after_drop"}),
    Case(
        "after_drop_plain_scores",
        {"capacity_factor": 0.7, "capacity_normalize": "after_drop", "normalize": "none"},
    ),
    Case("next_best", {"capacity_factor": 0.9, "capacity_overflow": "next_best", "top_k": 3}),
    Case(
        "backup",
        {
            "capacity_factor": 0.6,
            "capacity_order": "token",
            "capacity_overflow": "backup",
            "capacity_backup": torch.tensor([1, 2, 3, 4, 5, 0]),
        },
        masked=True,
    ),
    Case("minimum", {"capacity_factor": 0.1, "capacity_minimum": 4}),
    Case("eval_factor", {"capacity_factor": 0.5, "capacity_eval_factor": 1.1}, train=False),
    Case("masked", {"z_loss_weight": 0.1}, masked=True),
    Case("masked_capacity", {"capacity_factor": 1.1, "bias": True}, masked=True),
    Case("jitter", {"input_jitter": 0.05}),
    Case("noise", {"logit_noise": 0.5}),
    Case("quiet_in_eval", {"input_jitter": 0.05, "logit_noise": 0.5}, train=False),
    *(
        Case(f"everything_{str(dtype).removeprefix('torch.')}", everything, dtype, masked=True)
        for dtype in FLOATS
        for everything in [
            {
                "activation": "geglu",
                "bias": True,
                "router_bias": True,
                "input_jitter": 0.05,
                "logit_noise": 0.1,
                "capacity_factor": 0.9,
                "z_loss_weight": 0.001,
            }
        ]
    ),
]


def python_layer(settings: dict[str, Any], dtype: torch.dtype) -> torchmoe.nn.MoE:
    """The Python layer of the settings."""
    nn = torchmoe.nn
    capacity = None
    if settings["capacity_factor"] is not None:
        backup = settings["capacity_backup"]
        capacity = nn.Capacity(
            settings["capacity_factor"],
            eval_factor=settings["capacity_eval_factor"],
            minimum=settings["capacity_minimum"],
            order=settings["capacity_order"],
            overflow=settings["capacity_overflow"],
            backup=None if backup is None else backup.tolist(),
            normalize=settings["capacity_normalize"],
        )
    router = nn.Router(
        HIDDEN,
        EXPERTS,
        bias=settings["router_bias"],
        input_jitter=settings["input_jitter"],
        logit_noise=settings["logit_noise"],
    )
    layer = nn.MoE(
        HIDDEN,
        INTERMEDIATE,
        EXPERTS,
        settings["top_k"],
        activation=settings["activation"],
        bias=settings["bias"],
        gate=nn.Gate(
            score_function=settings["score_function"],
            normalize=settings["normalize"],
            estimator=settings["estimator"],
        ),
        capacity=capacity,
        balance=nn.Balance(settings["balance_weight"], z_loss_weight=settings["z_loss_weight"]),
        router=router,
    )
    return layer.to(dtype)


def run_python(layer: torchmoe.nn.MoE, request: dict[str, Any]) -> dict[str, Tensor]:
    """What parity.cpp does, in Python."""
    layer.train(request["train"])
    x = request["x"].clone().requires_grad_()
    torch.manual_seed(request["seed"])
    output = layer(x, token_mask=request["token_mask"])
    torch.autograd.backward([output.hidden_states, output.aux_loss], [request["grad"], None])
    routing = output.routing
    result = {
        "hidden_states": output.hidden_states,
        "aux_loss": output.aux_loss,
        "logits": routing.logits,
        "weights": routing.weights,
        "selected": routing.selected,
        "indices": routing.indices,
        "tokens_per_expert": routing.tokens_per_expert,
        "kept_per_expert": routing.kept_per_expert,
        "gradients.x": x.grad,
    }
    result.update({f"losses.{name}": loss for name, loss in routing.losses.items()})
    for name, parameter in layer.named_parameters():
        result[f"parameters.{name}"] = parameter
        result[f"gradients.{name}"] = parameter.grad
    return {name: value.detach() for name, value in result.items() if value is not None}


def run_cpp(request: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The program's answer."""
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM} is missing: cmake --build build --target torchmoe_parity")
    torch.save(request, folder / "request.pt")
    done = subprocess.run(
        [PROGRAM, folder / "request.pt", folder / "result.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # LibTorch writes the dict's type next to it, which the restricted reader does not know.
    loaded: dict[str, Tensor] = torch.load(folder / "result.pt", weights_only=False)
    return loaded


def request_of(case: Case, parameters: dict[str, Tensor] | None) -> dict[str, Any]:
    """The request of a case; without parameters the program draws its own."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(*SHAPE, HIDDEN, generator=generator)
    grad = torch.randn(*SHAPE, HIDDEN, generator=generator)
    mask = torch.rand(SHAPE, generator=generator) < 0.7 if case.masked else None
    return {
        "config": {**SETTINGS, **case.settings},
        "dtype": torch.empty(0, dtype=case.dtype),
        "parameters": parameters,
        "x": x.to(case.dtype),
        "grad": grad.to(case.dtype),
        "token_mask": mask,
        "train": case.train,
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """All that a tensor is; unlike ==, tells 0 from -0."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor, by name."""
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if bits(actual[name]) != bits(expected[name])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_of_python_give_the_same_bits_in_cpp(case: Case, tmp_path: Path) -> None:
    layer = python_layer({**SETTINGS, **case.settings}, case.dtype)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    request = request_of(case, parameters)
    expected = run_python(layer, request)
    assert all(value.isfinite().all() for value in expected.values())
    assert_same_bits(run_cpp(request, tmp_path), expected)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("plain", "relu", "everything_bfloat16")],
    ids=lambda case: case.name,
)
def test_parameters_of_cpp_give_the_same_bits_in_python(case: Case, tmp_path: Path) -> None:
    request = request_of(case, None)
    actual = run_cpp(request, tmp_path)
    prefix = "parameters."
    state = {
        name.removeprefix(prefix): value
        for name, value in actual.items()
        if name.startswith(prefix)
    }
    layer = python_layer({**SETTINGS, **case.settings}, case.dtype)
    layer.load_state_dict(state)
    assert_same_bits(actual, run_python(layer, request))


@pytest.mark.parametrize("bias", [False, True])
def test_one_seed_draws_the_same_parameters(bias: bool, tmp_path: Path) -> None:
    case = Case("drawn", {"bias": bias, "router_bias": bias})
    actual = run_cpp(request_of(case, None), tmp_path)
    torch.manual_seed(SEED)
    layer = python_layer({**SETTINGS, **case.settings}, case.dtype)
    for name, value in layer.named_parameters():
        assert torch.equal(actual[f"parameters.{name}"], value), name

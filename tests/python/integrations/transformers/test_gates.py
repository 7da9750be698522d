"""What is taken for one of the op's activations, and what is left to the class's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

pytest.importorskip("transformers", reason="needs transformers")

from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from integrations.transformers.experts_case import OURS, E, H, I, inputs_of, module_of, step
from op_case import assert_close, tolerance
from torchmoe.integrations.transformers import supported
from torchmoe.integrations.transformers.gates import Activation, activation_of


@use_experts_implementation
class Changeable(nn.Module):
    """Mixtral's, with a gate that a subclass may replace."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))
        self.act_fn = nn.SiLU()
        self.limit = 7.0
        self.training_scale = 1.0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for expert in range(E):
            token, slot = torch.where(top_k_index == expert)
            rows = self._apply_gate(hidden_states[token] @ self.gate_up_proj[expert].T)
            rows = rows @ self.down_proj[expert].T * top_k_weights[token, slot, None]
            y = y.index_add(0, token, rows)
        return y


class ClampedAfter(Changeable):
    """As step3p7: the limit is that of silu's value."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = self.act_fn(gate).clamp(max=self.limit)
        return gate * up.clamp(min=-self.limit, max=self.limit)


class ClampedBefore(Changeable):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = self.act_fn(gate.clamp(max=self.limit))
        return gate * up.clamp(min=-self.limit, max=self.limit)


class GateAlone(Changeable):
    """Only the gate has a limit."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up


class Swapped(Changeable):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        up, gate = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Alternating(Changeable):
    """Reads gates and values in turn, which its decorator does not say."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


class Detached(Changeable):
    """The values of SwiGLU without its gradient."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).detach() * up


class AlmostSwiGLU(Changeable):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up * (1 + 1e-12)


class Scaled(Changeable):
    """Reads what is no setting of an activation."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up * self.training_scale


def changeable(kind: type[Changeable]) -> Changeable:
    module = kind(module_of("MixtralExperts").config).double()
    for name, std in (("gate_up_proj", H**-0.5), ("down_proj", I**-0.5)):
        nn.init.normal_(getattr(module, name), std=std)
    return module


def assert_equals_eager(module: Any) -> None:
    inputs = inputs_of(module)
    actual, expected = (step(module, inputs, name) for name in (OURS, "eager"))
    for name, value in expected.items():
        sums = 2 * (H + I) + H + inputs.top_k_index.numel()
        atol = tolerance(value, n=sums, wide=torch.float64, stored=torch.float64)
        assert_close(actual[name], value, atol)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Changeable, Activation("swiglu")),
        (ClampedBefore, Activation("swiglu", limit=7.0)),
        (ClampedAfter, None),
        (GateAlone, None),
        (Swapped, None),
        (Alternating, None),
        (Detached, None),
        (AlmostSwiGLU, None),
        (Scaled, None),
    ],
)
def test_a_gate_is_known_by_what_it_computes(
    kind: type[Changeable], expected: Activation | None
) -> None:
    module = changeable(kind)
    assert activation_of(module) == expected
    assert supported(module) == ("composed" if expected is None else "fused")
    assert_equals_eager(module)


def test_a_limit_that_changes() -> None:
    module = changeable(ClampedAfter)
    assert activation_of(module) is None
    module.limit = float("inf")
    assert activation_of(module) == Activation("swiglu")
    module = changeable(ClampedBefore)
    for limit in (0.1, 7.0, 100.0):
        module.limit = limit
        assert activation_of(module) == Activation("swiglu", limit=limit)
        assert_equals_eager(module)


def test_a_gate_of_one_module_alone() -> None:
    module = changeable(Changeable)
    module._apply_gate = lambda gate_up: gate_up[..., :I]  # type: ignore[method-assign]
    assert supported(module) == "composed"
    assert_equals_eager(module)


FUSED = {
    **dict.fromkeys(("silu", "swish"), "swiglu"),
    **dict.fromkeys(("gelu", "gelu_python"), "geglu"),
    **dict.fromkeys(("gelu_new", "gelu_accurate"), "geglu_tanh"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), "geglu_tanh"),
    "relu": "reglu",
    "quick_gelu": "swiglu",
}


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"xielu"}))
def test_every_activation_of_transformers(name: str) -> None:
    """The one left out has parameters in bfloat16 alone."""
    module = changeable(Changeable)
    assert_equals_eager(module)
    module.act_fn = ACT2FN[name].double()  # after a call with another
    found = activation_of(module)
    assert (found and found.name) == FUSED.get(name)
    assert_equals_eager(module)


@pytest.mark.parametrize("name", ["relu2", "relu", "gelu", "silu", "gelu_pytorch_tanh", "tanh"])
def test_experts_without_a_gate(name: str) -> None:
    module = module_of("NemotronHExperts")
    module.act_fn = ACT2FN[name]
    assert supported(module) == ("composed" if name == "tanh" else "fused")
    assert_equals_eager(module)


def test_functions_in_the_place_of_modules() -> None:
    module = changeable(Changeable)
    del module.act_fn
    module.act_fn = silu
    assert activation_of(module) == Activation("swiglu")
    module.act_fn = lambda gate: silu(gate)
    assert activation_of(module) is None
    assert_equals_eager(module)


@pytest.mark.parametrize("name", ["BeamExperts", "Inkling2Experts"])
def test_gates_in_float32(name: str) -> None:
    """They agree to the rounding of float32, which all of their values have."""
    module = module_of(name)
    found = activation_of(module)
    caps = (module.config.mlp_gate_softcap, module.config.mlp_up_softcap) if "2" in name else ()
    assert found == Activation("swiglu", 1.0, None, 0.0, *caps)


@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_a_softcap_that_changes(softcap: float) -> None:
    module = module_of("Inkling2Experts", torch.float32)
    module.act_fn.up_softcap.softcap = softcap
    found = activation_of(module)
    assert found is not None
    assert found.up_softcap == softcap


def test_the_callers_modes_do_not_matter() -> None:
    """Each limit is a setting that no test has compared before."""
    module = changeable(ClampedBefore)
    modes = [
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    ]
    for limit, mode in enumerate(modes, start=31):
        module.limit = float(limit)
        with mode:
            assert activation_of(module) == Activation("swiglu", limit=float(limit))

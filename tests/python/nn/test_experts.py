"""The stacked experts: names, layout, initial values, and exchange with Transformers."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

import reference
from plain_moe import gradients
from torchmoe import ops
from torchmoe.nn import Experts

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64

#: Torch's own where it has one.
FUNCTIONS = {
    **reference.PLAIN,
    **reference.GATED,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(x, indices, weights) with a slot that goes nowhere and an expert that gets nothing."""
    indices = torch.rand(T, E - 1).topk(K).indices
    indices[3, 0] = -1
    indices[4] = E
    x = torch.randn(T, H, dtype=F64, requires_grad=True)
    weights = torch.rand(T, K, dtype=F64, requires_grad=True)
    return x, indices, weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_equals_one_network_per_expert(activation: str, bias: bool) -> None:
    experts = Experts(H, INNER, E, activation=activation, bias=bias, dtype=F64)
    x, indices, weights = inputs()
    direction = torch.randn(T, H, dtype=F64)
    y = experts(x, indices, weights)
    (y * direction).sum().backward()
    got = gradients(experts) | {"x": x.grad, "weights": weights.grad}
    experts.zero_grad()
    x.grad = weights.grad = None

    gated = activation in ops.GATED_ACTIVATIONS
    w_in, b_in = (
        (experts.gate_up_proj, experts.gate_up_proj_bias)
        if gated
        else (experts.up_proj, experts.up_proj_bias)
    )
    act = FUNCTIONS[activation]
    expected = torch.zeros_like(x) + 0 * sum(p.sum() for p in experts.parameters())
    for e in range(E):
        pre = F.linear(x, w_in[e], None if b_in is None else b_in[e])
        hidden = act(pre[:, :INNER]) * pre[:, INNER:] if gated else act(pre)
        b_out = None if experts.down_proj_bias is None else experts.down_proj_bias[e]
        out = F.linear(hidden, experts.down_proj[e], b_out)
        expected = expected + out * ((indices == e) * weights).sum(1, keepdim=True)
    (expected * direction).sum().backward()
    assert_close(y, expected)
    assert_close(got, gradients(experts) | {"x": x.grad, "weights": weights.grad})


def test_names_and_shapes() -> None:
    gated = {name: tuple(p.shape) for name, p in Experts(H, INNER, E, bias=True).named_parameters()}
    assert gated == {
        "gate_up_proj": (E, 2 * INNER, H),
        "gate_up_proj_bias": (E, 2 * INNER),
        "down_proj": (E, H, INNER),
        "down_proj_bias": (E, H),
    }
    plain = {
        n: tuple(p.shape) for n, p in Experts(H, INNER, E, activation="relu").named_parameters()
    }
    assert plain == {"up_proj": (E, INNER, H), "down_proj": (E, H, INNER)}
    assert Experts(H, INNER, E).down_proj_bias is None
    assert Experts(H, INNER, E, activation="relu").up_proj_bias is None


def test_initial_values_are_those_of_linear_layers() -> None:
    experts = Experts(64, 16, 8, bias=True)
    for name, parameter in experts.named_parameters():
        bound = 1 / math.sqrt(16 if name.startswith("down_proj") else 64)
        reference = nn.Linear(round(bound**-2), 1).weight
        assert reference.abs().max() <= bound
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.95 * bound
        assert parameter.abs().amin() < 0.05 * bound


def test_an_idle_expert_gets_a_gradient_of_zeros() -> None:
    experts = Experts(H, INNER, E, bias=True, dtype=F64)
    experts(*inputs()).sum().backward()
    for gradient in gradients(experts).values():
        assert (gradient[E - 1] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, INNER, E), {}, r"Experts: hidden_size must be >= 1, got 0"),
        ((H, 0, E), {}, r"Experts: intermediate_size must be >= 1, got 0"),
        ((H, INNER, 0), {}, r"Experts: num_experts must be >= 1, got 0"),
        (
            (H, INNER, E),
            {"activation": "tanh"},
            r'Experts: activation must be one of .*"silu", "swiglu".*, got "tanh"',
        ),
    ],
)
def test_errors(arguments: tuple[int, ...], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(*arguments, **options)


def test_exchanges_parameters_with_transformers() -> None:
    mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    theirs = mixtral.MixtralExperts(config).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = Experts(H, INNER, E, dtype=F64)
    ours.load_state_dict(theirs.state_dict())
    x, indices, weights = inputs()
    indices = torch.where(indices == -1, E, indices)  # what Transformers calls "not routed"
    assert_close(ours(x, indices, weights), theirs(x, indices, weights))
    theirs.load_state_dict(ours.state_dict())

"""A layer's output is used in place of a tensor: the error says what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from torchmoe import ops
from torchmoe.nn import MoE, MoEOutput, WithAttachedLoss

H = 4
X = torch.randn(3, H)
ADVICE = r"MoEOutput; take its hidden_states, or let WithAttachedLoss\(moe\) return them alone$"


def layer() -> MoE:
    return MoE(H, 5, 4, 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y + X,
        lambda y: X + y,
        lambda y: y * 2.0,
        lambda y: 2.0 * y,
        lambda y: 1 + y,
        lambda y: y - X,
        lambda y: X - y,
        lambda y: 1 - y,
        lambda y: -y,
        lambda y: y / 2,
        lambda y: X / y,
        lambda y: y @ X.t(),
        lambda y: X.t() @ y,
        lambda y: sum([y, y]),
        lambda y: torch.relu(y),
        lambda y: torch.cat([y, X]),
        lambda y: nn.functional.layer_norm(y, (H,)),
    ],
)
def test_in_a_formula(use: Callable[[MoEOutput], Any]) -> None:
    with pytest.raises(TypeError, match=rf"^MoE: (a|an) .* must be a tensor, got .*{ADVICE}"):
        use(layer()(X))


@pytest.mark.parametrize(
    "after", [nn.Linear(H, H), nn.ReLU(), nn.LayerNorm(H), nn.GELU(), nn.Dropout(), layer()]
)
def test_in_a_sequence(after: nn.Module) -> None:
    model = nn.Sequential(layer(), after)
    with pytest.raises(TypeError, match=rf"^MoE: .* must be a tensor, got .*{ADVICE}"):
        model(X)
    with torch.no_grad():
        nn.Sequential(WithAttachedLoss(model[0]), after)(X)


@pytest.mark.parametrize("name", ["shape", "mean", "view", "dtype", "requires_grad"])
def test_a_tensor_s_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"^MoE: the owner of \.{name} must be .*{ADVICE}"):
        getattr(layer()(X), name)


def test_another_attribute_is_missing_as_of_any_tuple() -> None:
    output = layer()(X)
    with pytest.raises(AttributeError, match=r"^'MoEOutput' object has no attribute 'hidden'$"):
        getattr(output, "hidden")  # noqa: B009
    assert not hasattr(output, "detach")


def test_it_is_a_tuple_as_ever() -> None:
    output = layer()(X)
    y, aux_loss, routing = output
    assert output[0] is y
    assert len(output) == 3
    assert (output + output)[3] is y
    more = (1, 2)
    assert (output + more)[3] == 1
    assert (more + output)[2] is y
    assert output[:2] == (y, aux_loss)
    assert output._replace(aux_loss=y).aux_loss is y
    assert copy.copy(output).routing is routing
    leaves, spec = pytree.tree_flatten(output)
    assert isinstance(pytree.tree_unflatten(leaves, spec), MoEOutput)
    detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
    again = pickle.loads(pickle.dumps(detached))
    assert torch.equal(again.hidden_states, y)
    moe = layer()
    through = checkpoint(moe, X, use_reentrant=False)
    assert isinstance(through, MoEOutput)
    compiled = torch.compile(moe, fullgraph=True, backend="eager")(X)
    assert torch.equal(compiled.hidden_states, moe(X).hidden_states)


def test_tokens_of_another_type_than_the_layer() -> None:
    with pytest.raises(RuntimeError, match=r"^router_logits: x must have the dtype of weight"):
        layer()(X.double())


class TestOps:
    def test_arguments_in_another_order(self) -> None:
        indices = torch.tensor([[0, 1], [1, 0], [0, 1]])
        plan = ops.dispatch_plan(indices, 2)
        weights = torch.ones(3, 2)
        for call, message in (
            (lambda: ops.permute(plan, X), "permute: plan must be a DispatchPlan, got a tensor"),
            (lambda: ops.unpermute(plan, weights, X), "unpermute: plan must be a DispatchPlan"),
            (
                lambda: ops.gate_weights(
                    indices, weights, score_function="softmax", normalize="topk", estimator="exact"
                ),
                "gate_weights: logits must be float32, float64",
            ),
            (lambda: ops.router_logits(torch.randn(2, H + 1), X), "router_logits: weight must be"),
            (lambda: ops.mean_over_tokens(None), "mean_over_tokens: values must be a tensor, got"),
            (lambda: ops.router_z_loss("x"), "router_z_loss: logits must be a tensor, got 'x'"),
        ):
            with pytest.raises((TypeError, RuntimeError), match=f"^{message}"):
                call()


def test_a_compiled_layer_can_be_wrapped() -> None:
    moe = layer()
    wrapped = WithAttachedLoss(torch.compile(moe, backend="eager"))
    assert torch.equal(wrapped(X), moe(X).hidden_states)
    with pytest.raises(TypeError, match=r"^WithAttachedLoss: moe must be a MoE, got Linear$"):
        WithAttachedLoss(nn.Linear(H, H))

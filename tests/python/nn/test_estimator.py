"""Estimators: the two built in, and those of a user."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from plain_moe import gradients
from torchmoe import ops
from torchmoe.nn import Balance, Estimator, Exact, Gate, MoE, StraightThrough, register_estimator

H, INNER, E, K, T = 6, 7, 5, 2, 23
F64 = torch.float64


def make(estimator: str | Estimator, **options: object) -> MoE:
    return MoE(H, INNER, E, K, gate=Gate(estimator=estimator), dtype=F64, **options)


def test_built_in_estimators_differ_in_the_gradient_only() -> None:
    exact, other = (
        make("exact", balance=Balance(weight=0.0)),
        make("straight_through", balance=Balance(weight=0.0)),
    )
    assert isinstance(exact.estimator, Exact)
    assert isinstance(other.estimator, StraightThrough)
    other.load_state_dict(exact.state_dict())
    x = torch.randn(T, H, dtype=F64)
    direction = torch.randn(T, H, dtype=F64)
    outputs = [exact(x), other(x)]
    assert torch.equal(outputs[0].hidden_states, outputs[1].hidden_states)
    for output in outputs:
        output.routing.weights.retain_grad()
        (output.hidden_states * direction).sum().backward()
    assert_close(exact.experts.down_proj.grad, other.experts.down_proj.grad)
    assert not torch.allclose(exact.router.weight.grad, other.router.weight.grad)

    # The definition: dL/dp gets g_j at the chosen experts, then goes through the softmax.
    routing = outputs[1].routing
    logits = routing.logits.detach().requires_grad_()
    grad_p = torch.zeros(T, E, dtype=F64).scatter_(1, routing.indices, routing.weights.grad)
    logits.softmax(-1).backward(grad_p)
    assert_close(other.router.weight.grad, logits.grad.T @ x)


def test_an_estimator_of_ones_own_in_ten_lines() -> None:
    class Doubled(Estimator):
        """The exact weights; the router learns twice as fast."""

        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return super().weigh(ops.scale_gradient(logits, torch.tensor(2.0)), indices)

    mine, exact = (
        make(Doubled(), balance=Balance(weight=0.0)),
        make("exact", balance=Balance(weight=0.0)),
    )
    exact.load_state_dict(mine.state_dict())
    x = torch.randn(T, H, dtype=F64)
    for moe in (mine, exact):
        moe(x).hidden_states.square().sum().backward()
    assert_close(mine.router.weight.grad, 2 * exact.router.weight.grad)
    assert_close(mine.experts.down_proj.grad, exact.experts.down_proj.grad)


class Recorder(Estimator):
    """Overrides every method; notes what it is given and keeps a running sum."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def bind(self, *, device: Any = None, dtype: Any = None, **layer: Any) -> None:
        super().bind(**layer, device=device, dtype=dtype)
        size = self.num_experts, self.hidden_size
        self.register_buffer("total", torch.zeros(size, device=device, dtype=dtype))

    def default_normalize(self) -> str:
        return "none"

    def select(
        self,
        logits: Tensor,
        *,
        selection_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        self.calls.append("select")
        worst = ops.select_experts(-logits, self.top_k, token_mask=token_mask)
        assert selection_bias is None
        return worst

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        self.calls.append("weigh")
        return super().weigh(logits, indices)

    def combine(
        self,
        x: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        experts: Any,
        *,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        self.calls.append("combine")
        y = experts(x, indices, weights)
        one_hot = torch.zeros_like(logits).scatter_(1, indices[:, :1].clamp(min=0), 1.0)
        return y, {"sums": one_hot.T @ y, "counts": (one_hot.sum(0), None)}

    def update(self, statistics: Any) -> None:
        self.calls.append("update")
        assert not torch.is_grad_enabled()
        assert statistics["counts"][1] is None
        self.total += statistics["sums"]

    def reset_parameters(self) -> None:
        self.total.zero_()


def test_a_stateful_estimator_with_every_method_overridden() -> None:
    estimator = Recorder()
    moe = make(estimator)
    assert moe.estimator is estimator
    assert (estimator.top_k, estimator.num_experts, estimator.hidden_size) == (K, E, H)
    assert (estimator.score_function, estimator.normalize) == ("softmax", "none")
    assert moe.state_dict()["estimator.total"].dtype == F64

    outputs = [moe(torch.randn(T, H, dtype=F64)) for _ in range(2)]
    assert estimator.calls == ["select", "weigh", "combine"] * 2
    routing = outputs[0].routing
    assert torch.equal(routing.indices, (-routing.logits).topk(K).indices)
    outputs[0].hidden_states.sum().backward()
    assert gradients(moe)
    assert (estimator.total == 0).all()

    sums = [output.routing.statistics["sums"] for output in outputs]
    moe.update(routing)
    assert_close(estimator.total, sums[0].detach())
    moe.update([output.routing for output in outputs])
    assert_close(estimator.total, (2 * sums[0] + sums[1]).detach())
    assert estimator.calls[-2:] == ["update", "update"]
    assert estimator.total.grad_fn is None
    moe.reset_parameters()
    assert (estimator.total == 0).all()
    assert copy.deepcopy(moe).estimator is not estimator


def test_one_instance_serves_layers_of_one_kind_only() -> None:
    estimator = StraightThrough()
    assert repr(estimator) == "StraightThrough()"
    make(estimator)
    make(estimator)
    with pytest.raises(ValueError, match=r"MoE: gate.estimator must be an instance of its own"):
        MoE(H, INNER, E, 1, gate=Gate(estimator=estimator))
    assert estimator.top_k == K


def test_names_may_be_registered() -> None:
    class Mine(Estimator):
        """Nothing new."""

    with pytest.raises(ValueError, match=r'register_estimator: name must be new, got "exact"'):
        register_estimator("exact", Mine)
    register_estimator("test_names_may_be_registered", Mine)
    gate = Gate(estimator="test_names_may_be_registered")
    one, other = MoE(H, INNER, E, K, gate=gate), MoE(H, INNER, E, 1, gate=gate)
    assert isinstance(one.estimator, Mine)
    assert one.estimator is not other.estimator
    with pytest.raises(ValueError, match=r'must be one of "exact", .*, "test_names_may_be'):
        Gate(estimator="unknown")


def test_sampling_replays_with_the_generator() -> None:
    class Sampled(Estimator):
        """Gumbel top-k: a draw without replacement from the softmax."""

        def select(
            self,
            logits: Tensor,
            *,
            selection_bias: Tensor | None = None,
            token_mask: Tensor | None = None,
        ) -> Tensor:
            gumbel = -torch.empty_like(logits).exponential_().log()
            return super().select(logits + gumbel, token_mask=token_mask)

    moe = make(Sampled())
    x = torch.randn(T, H, dtype=F64)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(moe(x).routing.indices)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])

"""What a peer and our layer are compared in, and how closely they must agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from op_case import assert_close, tolerance
from torchmoe.nn import MoE


@dataclass(frozen=True)
class Sizes:
    """T tokens of width H, E experts of inner width I."""

    T: int
    H: int
    I: int  # noqa: E741  the glossary's letter
    E: int

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tokens, and what to multiply the output by. An offset makes the load uneven."""
        x = torch.randn(self.T, self.H, dtype=dtype) + torch.randn(self.H, dtype=dtype)
        return x, torch.randn(self.T, self.H, dtype=dtype)

    @property
    def longest_sum(self) -> int:
        """A gradient of the router's weight sums over tokens what the experts sum over H and I.

        Each of them forward and backward; the softmax adds its experts. Peer and layer both err.
        """
        return 2 * (self.T + 2 * (self.H + self.I) + self.E)


@dataclass(frozen=True)
class Result:
    """One step of a layer."""

    kept: Tensor
    """[T, E] bool: which expert serves which token."""
    weights: Tensor
    """[T, E]: combine weights, 0 where an expert does not serve."""
    y: Tensor
    """[T, H]."""
    losses: dict[str, Tensor]
    """Unweighted, under our names."""
    gradients: dict[str, Tensor]
    """Of <y, direction> + weighted losses, for x, the router's weight and the experts."""


def table(indices: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots [T, K] as `kept` and `weights` [T, E]; an id outside [0, E) is no slot."""
    routed = (indices >= 0) & (indices < num_experts)
    columns = torch.where(routed, indices, num_experts)
    shape = (indices.shape[0], num_experts + 1)
    kept = torch.zeros(shape, dtype=torch.bool).scatter(1, columns, True)[:, :num_experts]
    dense = weights.new_zeros(shape).scatter(1, columns, weights.detach())[:, :num_experts]
    return kept, dense


def gradients(x: Tensor, router: Tensor, experts: nn.Module) -> dict[str, Tensor]:
    """By name; a parameter of an idle expert may have none, which counts as zeros."""
    found = {"x": x.grad, "router": router.grad}
    found |= {f"experts.{name}": p.grad for name, p in experts.named_parameters()}
    shapes = {"x": x, "router": router}
    shapes |= {f"experts.{name}": p for name, p in experts.named_parameters()}
    return {
        name: torch.zeros_like(shapes[name]) if grad is None else grad.clone()
        for name, grad in found.items()
    }


def step(moe: MoE, x: Tensor, direction: Tensor) -> Result:
    """One step of our layer."""
    x = x.clone().requires_grad_()
    output = moe(x)
    ((output.hidden_states * direction).sum() + output.aux_loss).backward()
    routing = output.routing
    kept, weights = table(routing.indices, routing.weights, moe.num_experts)
    return Result(
        kept=kept,
        weights=weights,
        y=output.hidden_states.detach(),
        losses={name: loss.detach() for name, loss in routing.losses.items()},
        gradients=gradients(x, moe.router.weight, moe.experts),
    )


def assert_agree(ours: Result, peer: Result, sizes: Sizes) -> None:
    """The same slots, and the same values within the error of their sums."""
    assert torch.equal(ours.kept, peer.kept)
    assert ours.losses.keys() == peer.losses.keys()
    assert ours.gradients.keys() == peer.gradients.keys()
    pairs = {"weights": (ours.weights, peer.weights), "y": (ours.y, peer.y)}
    pairs |= {name: (ours.losses[name], peer.losses[name]) for name in peer.losses}
    pairs |= {name: (ours.gradients[name], peer.gradients[name]) for name in peer.gradients}
    for name, (actual, expected) in pairs.items():
        assert actual.dtype == expected.dtype, name
        atol = tolerance(expected, n=sizes.longest_sum, wide=actual.dtype, stored=actual.dtype)
        assert_close(actual, expected, atol)


def assert_drops(result: Result, top_k: int, sizes: Sizes) -> None:
    """Some slots are dropped, or a comparison of what is dropped would say nothing."""
    assert 0 < result.kept.sum() < top_k * sizes.T


def copy_router(moe: MoE, weight: Tensor) -> None:
    """Gives our router the peer's weight."""
    with torch.no_grad():
        moe.router.weight.copy_(weight)


def randomize(modules: Iterable[nn.Module]) -> None:
    """Draws every parameter again: peers start their experts as copies of one another, or empty."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

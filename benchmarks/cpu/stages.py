"""Where does the time of a step go?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import torchmoe
from benchmarks.clock import Run, timed
from benchmarks.contenders import OURS, Shape, inputs, our_layer
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.traffic import matrices, our_module
from torchmoe import ops

ROUTING = ("router_logits", "select_experts", "gate_weights", "dispatch_plan", "limit_capacity")


@dataclass(frozen=True)
class Stage:
    """An op on inputs as the layer gives them; without leaves it has no backward pass."""

    forward: Callable[[], object]
    leaves: Sequence[Tensor] = ()

    def backward(self) -> Run:
        """The backward pass alone, of one forward pass that is kept."""
        y = self.forward()
        assert isinstance(y, Tensor)
        grad = torch.ones_like(y)
        return timed(lambda: torch.autograd.grad(y, self.leaves, grad, retain_graph=True))


def stages(shape: Shape, layer: torchmoe.nn.MoE, tokens: Tensor) -> dict[str, Stage]:
    """Every op of the layer, and limit_capacity, which it runs where a capacity is set."""
    x, router = tokens.detach().requires_grad_(), layer.router.get_parameter("weight")
    w_in, w_out = matrices(layer)
    logits = ops.router_logits(x, router).detach().requires_grad_()
    fixed = logits.detach()
    indices = ops.select_experts(fixed, shape.top_k)
    weigh = partial(
        ops.gate_weights,
        score_function="softmax",
        normalize="topk" if shape.top_k > 1 else "none",  # a single weight is always 1
        estimator="exact",
    )
    weights = weigh(fixed, indices).requires_grad_()
    counts = ops.dispatch_plan(indices, shape.experts).expert_offsets.diff()
    fraction = counts / shape.rows
    capacity = torchmoe.expert_capacity(shape.tokens, shape.experts, shape.top_k, 1.25)
    return {
        "router_logits": Stage(lambda: ops.router_logits(x, router), [x, router]),
        "select_experts": Stage(lambda: ops.select_experts(fixed, shape.top_k)),
        "gate_weights": Stage(lambda: weigh(logits, indices), [logits]),
        "dispatch_plan": Stage(lambda: ops.dispatch_plan(indices, shape.experts)),
        "limit_capacity": Stage(
            lambda: ops.limit_capacity(indices, capacity, num_experts=shape.experts)
        ),
        "expert_mlp": Stage(
            lambda: ops.expert_mlp(x, indices, weights, w_in, None, w_out, None, "swiglu"),
            [x, weights, w_in, w_out],
        ),
        "load_balancing_loss": Stage(
            lambda: ops.load_balancing_loss(logits, fraction, score_function="softmax"), [logits]
        ),
    }


def times_of(shape: Shape, settings: Settings) -> dict[str, float]:
    """Seconds of each stage's directions and of the layer's step, fastest rounds."""
    torch.manual_seed(0)
    ours = our_layer(shape, torch.float32)
    x, grad = inputs(shape, torch.float32)
    runs: dict[str, Run] = {OURS: partial(ours.step, x, grad)}
    for name, stage in stages(shape, our_module(ours), x).items():
        runs[name] = timed(stage.forward)
        if stage.leaves:
            runs[f"{name} backward"] = stage.backward()
    block = settings.clock.measure(f"stages, {shape}", runs)
    return {name: times.low for name, times in block.times.items()}


def section_stages(settings: Settings) -> Section:
    """Milliseconds per stage, and the share of the routing."""
    shapes = settings.shapes
    columns = [times_of(shape, settings) for shape in shapes]

    def routing(times: dict[str, float]) -> float:
        return sum(times[name] + times.get(f"{name} backward", 0.0) for name in ROUTING)

    names = [name for name in columns[0] if name != OURS]
    rows = [[name, *(f"{1e3 * times[name]:.3f}" for times in columns)] for name in names]
    rows.append(["the layer's step", *(f"{1e3 * times[OURS]:.3f}" for times in columns)])
    shares = [routing(times) / times[OURS] for times in columns]
    rows.append(["routing over the step", *(f"{share:.1%}" for share in shares)])
    return Section(
        "Where the time of a step goes",
        "Each op alone, on the inputs that the layer gives it, forward and backward: milliseconds "
        f"of the fastest rounds. Routing is {', '.join(ROUTING)} in both directions; "
        "limit_capacity runs only in a layer with a capacity.",
        [table(["T, H, I, E, K", *(str(shape) for shape in shapes)], rows)],
    )

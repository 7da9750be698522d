"""What is timed against what: the layer, its peers with the same parameters, and the dense bound.

- torchmoe: `torchmoe.nn.MoE` from router to output;
- Transformers: its Mixtral block with `grouped_mm` and with `eager` experts;
- the plain loop: what a textbook writes in torch, one expert after another;
- the dense bound: `torch.mm` of the same floating-point operations, six for a training step (18 T K
  H I) and two for the forward pass (6 T K H I), each one product over all T*K rows with no routing
  at all.

`check_agreement` shows that a peer computes what torchmoe computes, before either is timed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import torchmoe

OURS, LOOP = "torchmoe", "plain torch loop"
IN_FLOAT32 = f"{OURS} float32"
TRANSFORMERS = ("grouped_mm", "eager")  # the implementations of its experts

# A peer adds the same values in another order, so a sum of n terms may differ by n * eps of the
# largest element; four such sums follow one another (router, W_in, W_out and their backward).
AGREEMENT = 4

Step = Callable[[Tensor], float]  # runs once on these tokens and says how many seconds it took


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer and its batch."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads "T,H,I,E,K"."""
        try:
            shape = cls(*(int(field) for field in text.split(",")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"must be five integers T,H,I,E,K, got {text!r}"
            ) from None
        if min(asdict(shape).values()) < 1 or shape.top_k > shape.experts:
            raise argparse.ArgumentTypeError(
                f"must be five positive integers T,H,I,E,K with K at most E, got {text!r}"
            )
        return shape

    def __str__(self) -> str:
        """The sizes in the order of `parse`."""
        return ", ".join(str(size) for size in asdict(self).values())

    @property
    def rows(self) -> int:
        """Rows of the experts' products."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Floating-point operations of the experts' products, forward and backward."""
        return 18 * self.rows * self.hidden * self.intermediate


def add_shape_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --shape; `default` says what is timed without it."""
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        action="append",
        metavar="T,H,I,E,K",
        help="tokens, hidden size, intermediate size, experts, top-k; may be repeated "
        f"(default: {default})",
    )


def positive(text: str) -> int:
    """An integer of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


class Contender:
    """A module that maps [T, H] to [T, H], and the names of its gradients."""

    def __init__(
        self, name: str, module: nn.Module, output: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        """Takes how to get the output tensor from the module."""
        self.name = name
        self.module = module
        self._output = output

    def step(self, x: Tensor, grad: Tensor) -> float:
        """Seconds of one forward and backward, with fresh gradients as after `zero_grad()`."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        start = time.perf_counter()
        y = self._output(self.module, x)
        torch.autograd.backward([y], [grad])
        return time.perf_counter() - start

    def infer(self, x: Tensor) -> float:
        """Seconds of one forward without a gradient to come."""
        with torch.inference_mode():
            start = time.perf_counter()
            self._output(self.module, x)
            return time.perf_counter() - start

    def results(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """The output and every gradient, by the name of the layer's parameter."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        y = self._output(self.module, x)
        torch.autograd.backward([y], [grad])
        found = {"output": y, "gradient of x": x.grad}
        for name, gradient in named_gradients(self.module):
            found[f"gradient of {name.replace('gate.weight', 'router.weight')}"] = gradient
        if missing := [name for name, value in found.items() if value is None]:
            raise SystemExit(f"{self.name} gives no {', '.join(missing)}")
        # Detached, because converting the module converts its gradients in place.
        return {name: value.detach() for name, value in found.items() if value is not None}

    def to(self, dtype: torch.dtype) -> Contender:
        """Converts the module in place."""
        self.module.to(dtype)
        return self


def named_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Each parameter's; a list of one for each expert counts as one."""
    if isinstance(module, PlainLoop):
        yield "router.weight", module.router.grad
        for name, parameters in (("gate_up_proj", module.w_in), ("down_proj", module.w_out)):
            yield f"experts.{name}", torch.stack([p.grad for p in parameters if p.grad is not None])
    else:
        for name, parameter in module.named_parameters():
            yield name, parameter.grad


class PlainLoop(nn.Module):
    """A mixture of experts as a textbook writes it, with the parameters of ours."""

    def __init__(self, ours: torchmoe.nn.MoE) -> None:
        """Copies the parameters; each expert has its own, as a list of modules would."""
        super().__init__()
        state = ours.state_dict()
        self.top_k = ours.top_k
        self.router = nn.Parameter(state["router.weight"].clone())
        self.w_in = one_for_each(state["experts.gate_up_proj"])
        self.w_out = one_for_each(state["experts.down_proj"])

    def forward(self, x: Tensor) -> Tensor:
        """The best experts' outputs, weighted by their renormalised probabilities."""
        probs = linear(x, self.router).softmax(dim=-1, dtype=torch.float32)
        weights, indices = probs.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return loop_over_experts(x, indices, weights, list(self.w_in), list(self.w_out))


def one_for_each(parameters: Tensor) -> nn.ParameterList:
    """A copy of each expert's as a parameter of its own."""
    return nn.ParameterList(nn.Parameter(one.clone()) for one in parameters)


def loop_over_experts(
    x: Tensor, indices: Tensor, weights: Tensor, w_in: Sequence[Tensor], w_out: Sequence[Tensor]
) -> Tensor:
    """The experts alone, for a given choice of them."""
    y = torch.zeros_like(x)
    for expert, (into, out_of) in enumerate(zip(w_in, w_out, strict=True)):
        token, choice = torch.where(indices == expert)
        gate, up = linear(x.index_select(0, token), into).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, out_of) * weights[token, choice].unsqueeze(1)
        y.index_add_(0, token, rows.to(y.dtype))
    return y


class DenseBound:
    """The products of one dense layer on all T*K rows: forward two, backward four."""

    def __init__(self, shape: Shape, dtype: torch.dtype, forward_only: bool = False) -> None:
        """Allocates every operand and result, so that a run does nothing but multiply."""
        self.name = "two dense mm" if forward_only else "six dense mm"
        hidden, inner = shape.hidden, shape.intermediate

        def matrix(height: int, width: int) -> Tensor:
            return torch.randn(height, width).to(dtype)

        x, pre, act, y = (matrix(shape.rows, n) for n in (hidden, 2 * inner, inner, hidden))
        w_in, w_out = matrix(2 * inner, hidden), matrix(hidden, inner)
        self._products = [(x, w_in.t(), pre.clone()), (act, w_out.t(), y.clone())]
        if not forward_only:
            self._products += [
                (y, w_out, act.clone()),
                (y.t(), act, w_out.clone()),
                (pre, w_in, x.clone()),
                (pre.t(), x, w_in.clone()),
            ]

    def run(self) -> float:
        """Seconds of all products."""
        start = time.perf_counter()
        for a, b, out in self._products:
            torch.mm(a, b, out=out)
        return time.perf_counter() - start


def our_layer(shape: Shape, dtype: torch.dtype) -> Contender:
    """The layer under test. The balancing loss is computed, as in training, and not added."""
    layer = torchmoe.nn.MoE(
        shape.hidden,
        shape.intermediate,
        shape.experts,
        shape.top_k,
        activation="swiglu",
        dtype=dtype,
    )
    return Contender(OURS, layer, lambda module, x: module(x).hidden_states)


def in_float32(ours: Contender) -> Contender:
    """The same layer with the same parameters, widened."""
    wide = copy.deepcopy(ours.module).to(torch.float32)
    return Contender(IN_FLOAT32, wide, lambda module, x: module(x).hidden_states)


def plain_loop(ours: Contender) -> Contender:
    """The textbook's layer with the parameters of `ours`."""
    assert isinstance(ours.module, torchmoe.nn.MoE)
    return Contender(LOOP, PlainLoop(ours.module), lambda module, x: module(x))


def mixtral_block(shape: Shape, ours: nn.Module, implementation: str) -> Contender:
    """Transformers' block with the parameters of `ours`, which have the same layout."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
        router_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    make_block: Any = MixtralSparseMoeBlock  # its constructor has no types
    block = make_block(config).to(next(ours.parameters()).dtype)
    state = {name.replace("router.", "gate."): value for name, value in ours.state_dict().items()}
    block.load_state_dict(state)
    name = f"transformers {implementation}"
    return Contender(name, block, lambda module, x: module(x.unsqueeze(0)).squeeze(0))


def transformers_version() -> str | None:
    """The installed version, or None."""
    try:
        import transformers
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: F401
    except ImportError:
        return None
    return str(transformers.__version__)


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of the output."""
    x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    return x, torch.randn(shape.tokens, shape.hidden).to(dtype)


def check_agreement(shape: Shape, ours: Contender, peer: Contender, dtype: torch.dtype) -> None:
    """Shows that both compute the same function before either is timed.

    Both run in float32, on weights and tokens of `dtype`, which float32 holds exactly. Two correct
    routers may rank two close experts differently, so tokens near such a tie are set to zero.
    """
    wide = torch.float32
    x, grad = (tensor.detach().to(wide) for tensor in inputs(shape, dtype))
    ours.to(wide)
    if shape.top_k < shape.experts:
        logits = x @ ours.module.get_parameter("router.weight").detach().t()
        ranked = logits.sort(dim=-1, descending=True).values
        gap = ranked[:, shape.top_k - 1] - ranked[:, shape.top_k]
        close = gap <= AGREEMENT * shape.hidden * torch.finfo(wide).eps * logits.abs().max()
        x[close], grad[close] = 0, 0
    x.requires_grad_()
    expected = ours.results(x, grad)
    actual = peer.to(wide).results(x, grad)
    ours.to(dtype), peer.to(dtype)
    if expected.keys() != actual.keys():
        raise SystemExit(f"{peer.name} has {sorted(actual)}, {ours.name} has {sorted(expected)}")
    longest = max(shape.hidden, 2 * shape.intermediate, shape.rows)
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        bound = AGREEMENT * longest * torch.finfo(wide).eps * value.abs().max().item()
        if not error <= bound:
            raise SystemExit(f"{peer.name}: {name} differs by {error:.3g}, more than {bound:.3g}")

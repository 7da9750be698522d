"""How fast is one mixture-of-experts layer, forward and backward?

Run it as `python -m benchmarks.moe_layer`. Three things are timed side by side:

- torchmoe: `torchmoe.nn.MoE` from router to output;
- peers: the Mixtral block of Hugging Face Transformers with its `grouped_mm` and its `eager`
  experts, where Transformers is installed, with the same weights and the same tokens;
- the dense bound: the six `torch.mm` of the same floating-point operations (18 T K H I), each one
  product over all T*K rows with no routing at all. No layer built on that library gets faster.

A machine's speed changes from minute to minute, so every round runs every contender once, in an
order that turns by one each round, and only ratios to the dense bound of the same rounds are worth
quoting. Each peer is first shown to compute what torchmoe computes; one that does not is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchmoe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("grouped_mm", "eager")
OURS, DENSE = "torchmoe", "six dense mm"

# A peer adds the same numbers in another order, so a sum of n terms may differ by n * eps of the
# largest element; four such sums follow one another (router, W_in, W_out and their backward).
AGREEMENT = 4


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

    @property
    def flops(self) -> int:
        """Floating-point operations of the experts' products, forward and backward."""
        return 18 * self.tokens * self.top_k * self.hidden * self.intermediate


DEFAULT_SHAPES = (
    Shape(1024, 256, 512, 8, 2),
    Shape(2048, 512, 1024, 8, 2),
    Shape(2048, 512, 256, 64, 8),
    Shape(1024, 512, 1792, 8, 2),
)


class Timing(NamedTuple):
    """Seconds of one run."""

    forward: float
    total: float


class Contender:
    """A module that maps [T, H] to [T, H], timed forward and backward."""

    def __init__(
        self, name: str, module: nn.Module, output: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        """Takes how to get the output tensor from the module."""
        self.name = name
        self.module = module
        self._output = output

    def run(self, x: Tensor, grad: Tensor) -> Timing:
        """One forward and backward, with fresh gradients as after `zero_grad()`."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        start = time.perf_counter()
        y = self._output(self.module, x)
        middle = time.perf_counter()
        torch.autograd.backward([y], [grad])
        return Timing(middle - start, time.perf_counter() - start)

    def results(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """The output and every gradient, by the name of the layer's parameter."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        y = self._output(self.module, x)
        torch.autograd.backward([y], [grad])
        found = {"output": y, "gradient of x": x.grad}
        for name, parameter in self.module.named_parameters():
            found[f"gradient of {name.replace('gate.weight', 'router.weight')}"] = parameter.grad
        if missing := [name for name, value in found.items() if value is None]:
            raise SystemExit(f"{self.name} gives no {', '.join(missing)}")
        # Detached, because converting the module converts its gradients in place.
        return {name: value.detach() for name, value in found.items() if value is not None}


class DenseBound:
    """The products of one dense layer on all T*K rows: forward two, backward four."""

    name = DENSE

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        """Allocates every operand and result, so that a run does nothing but multiply."""
        rows = shape.tokens * shape.top_k
        hidden, inner = shape.hidden, shape.intermediate

        def matrix(height: int, width: int) -> Tensor:
            return torch.randn(height, width).to(dtype)

        x, pre, act, y = (matrix(rows, n) for n in (hidden, 2 * inner, inner, hidden))
        w_in, w_out = matrix(2 * inner, hidden), matrix(hidden, inner)
        self._forward = [(x, w_in.t(), pre.clone()), (act, w_out.t(), y.clone())]
        self._backward = [
            (y, w_out, act.clone()),
            (y.t(), act, w_out.clone()),
            (pre, w_in, x.clone()),
            (pre.t(), x, w_in.clone()),
        ]

    def run(self, x: Tensor, grad: Tensor) -> Timing:
        """The six products; the layer's own tensors are not looked at."""
        del x, grad
        start = time.perf_counter()
        for a, b, out in self._forward:
            torch.mm(a, b, out=out)
        middle = time.perf_counter()
        for a, b, out in self._backward:
            torch.mm(a, b, out=out)
        return Timing(middle - start, time.perf_counter() - start)


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


def check_agreement(shape: Shape, ours: Contender, peer: Contender, dtype: torch.dtype) -> None:
    """Shows that both compute the same function before either is timed.

    Both run in float32, on weights and tokens of `dtype`, which float32 holds exactly. Two correct
    routers may rank two close experts differently, so tokens near such a tie are set to zero.
    """
    wide = torch.float32
    x, grad = (tensor.detach().to(wide) for tensor in inputs(shape, dtype))
    with_dtype(ours, wide)
    if shape.top_k < shape.experts:
        logits = x @ ours.module.get_parameter("router.weight").detach().t()
        ranked = logits.sort(dim=-1, descending=True).values
        gap = ranked[:, shape.top_k - 1] - ranked[:, shape.top_k]
        close = gap <= AGREEMENT * shape.hidden * torch.finfo(wide).eps * logits.abs().max()
        x[close], grad[close] = 0, 0
    x.requires_grad_()
    expected = ours.results(x, grad)
    actual = with_dtype(peer, wide).results(x, grad)
    with_dtype(ours, dtype), with_dtype(peer, dtype)
    if expected.keys() != actual.keys():
        raise SystemExit(f"{peer.name} has {sorted(actual)}, {ours.name} has {sorted(expected)}")
    longest = max(shape.hidden, 2 * shape.intermediate, shape.tokens * shape.top_k)
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        bound = AGREEMENT * longest * torch.finfo(wide).eps * value.abs().max().item()
        if not error <= bound:
            raise SystemExit(f"{peer.name}: {name} differs by {error:.3g}, more than {bound:.3g}")


def with_dtype(contender: Contender, dtype: torch.dtype) -> Contender:
    """Converts the contender's module in place."""
    contender.module.to(dtype)
    return contender


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of the output."""
    x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    return x, torch.randn(shape.tokens, shape.hidden).to(dtype)


def transformers_version() -> str | None:
    """The installed version, or None."""
    try:
        import transformers
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: F401
    except ImportError:
        return None
    return str(transformers.__version__)


def measure(
    shape: Shape, args: argparse.Namespace, peers: tuple[str, ...]
) -> dict[str, list[Timing]]:
    """Times every contender `args.rounds` times, interleaved."""
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    ours = our_layer(shape, dtype)
    contenders: list[Contender | DenseBound] = [DenseBound(shape, dtype), ours]
    for implementation in peers:
        peer = mixtral_block(shape, ours.module, implementation)
        check_agreement(shape, ours, peer, dtype)
        contenders.append(peer)
    x, grad = inputs(shape, dtype)
    times: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run(x, grad)
    for turn in range(args.rounds):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            times[contender.name].append(contender.run(x, grad))
    return times


def summarize(shape: Shape, times: dict[str, list[Timing]]) -> dict[str, dict[str, float]]:
    """Minima and medians in milliseconds, and their ratios D to the dense bound's."""

    def low_and_middle(name: str) -> tuple[float, float]:
        totals = [timing.total for timing in times[name]]
        return min(totals), statistics.median(totals)

    dense = low_and_middle(DENSE)
    rows = {}
    for name in times:
        low, middle = low_and_middle(name)
        rows[name] = {
            "forward_min_ms": 1e3 * min(timing.forward for timing in times[name]),
            "min_ms": 1e3 * low,
            "median_ms": 1e3 * middle,
            "min_over_dense": low / dense[0],
            "median_over_dense": middle / dense[1],
            "gflops": shape.flops / low / 1e9,
        }
    return rows


def print_table(shape: Shape, rows: dict[str, dict[str, float]]) -> None:
    """One table per shape; D is the time over the dense bound's."""
    sizes = "  ".join(f"{name} {size}" for name, size in asdict(shape).items())
    print(f"\n{sizes}  ({shape.flops / 1e9:.1f} GFLOP)")
    titles = ("forward ms", "min ms", "median ms", "D min", "D median", "GFLOP/s")
    print(f"  {'':24}" + "".join(f"{title:>11}" for title in titles))
    for name, row in rows.items():
        print(f"  {name:24}" + "".join(f"{value:11.2f}" for value in row.values()))


def environment(args: argparse.Namespace, transformers: str | None) -> dict[str, str | int]:
    """What a reader needs to judge the numbers."""
    return {
        "torchmoe": torchmoe.__version__,
        "torch": torch.__version__,
        "transformers": transformers or "not installed",
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "dtype": args.dtype,
    }


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_layer",
        description="Times one MoE layer, forward + backward, beside Transformers and torch.mm.",
    )
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        action="append",
        metavar="T,H,I,E,K",
        help="tokens, hidden size, intermediate size, experts, top-k; may be repeated "
        "(default: four shapes)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--rounds", type=positive, default=8, help="timed runs of each (default: 8)"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of torch (default: torch's own choice)"
    )
    parser.add_argument(
        "--peer",
        choices=PEERS,
        action="append",
        help="a Transformers implementation; may be repeated (default: both)",
    )
    parser.add_argument("--no-peers", action="store_true", help="only torchmoe and the dense bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    args = parser.parse_args(argv)
    if args.no_peers and args.peer:
        parser.error("--no-peers must not be given with --peer")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and, on request, writes."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    version = transformers_version()
    peers = () if args.no_peers or version is None else tuple(dict.fromkeys(args.peer or PEERS))
    described = environment(args, version)
    print(
        "One MoE layer, forward + backward. D: time over that of six dense torch.mm of its FLOPs."
    )
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    if version is None and not args.no_peers:
        print("note: no peer is timed, as Transformers is missing: pip install transformers")
    results = []
    for shape in args.shape or DEFAULT_SHAPES:
        if peers and shape.top_k == 1:
            print("note: no peer at K = 1, where Mixtral's weight is always 1 and its router idle")
        times = measure(shape, args, peers if shape.top_k > 1 else ())
        rows = summarize(shape, times)
        print_table(shape, rows)
        seconds = {name: [timing._asdict() for timing in runs] for name, runs in times.items()}
        results.append({"shape": asdict(shape), "summary": rows, "seconds": seconds})
    if args.json:
        report = {"environment": described, "results": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwrote {args.json}", file=sys.stderr)


if __name__ == "__main__":
    main()

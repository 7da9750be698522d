"""How fast are the layer and its routing ops on a GPU?

Run it as `python -m benchmarks.cuda_layer`. In one process, turn by turn:

- torchmoe: `expert_mlp` alone and the whole `torchmoe.nn.MoE`, from router to output and losses;
- peers: Transformers' `grouped_mm` experts and its whole Mixtral block, and what one would write
  with `torch._grouped_mm`, each first shown to give expert_mlp's results;
- the bound: the six balanced `torch.bmm` of the same floating-point operations, 6 T K H I forward
  and 12 T K H I backward, alone and with the activation between them.

Before each run the L2 cache is overwritten and the GPU waits for a millisecond, so that operands
come from memory and launches, where there are few enough, are not what is measured. A share is the
bound's time over the contender's, of the same rounds' medians. "saved" is what the forward pass
leaves allocated besides its output. The routing ops' bytes are those of their inputs and outputs,
each once, and their share is that of the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

import torchmoe
from benchmarks.contenders import (
    Shape,
    add_shape_option,
    mixtral_block,
    our_layer,
    positive,
    transformers_version,
)
from torchmoe import ops

DEVICE = "cuda"
DTYPE = torch.bfloat16
SHAPES = (
    Shape(24576, 1536, 256, 128, 8),
    Shape(32768, 4096, 1024, 64, 4),
    Shape(8192, 2048, 768, 128, 8),
    Shape(8192, 4096, 14336, 8, 2),
    Shape(1024, 256, 512, 8, 2),
)
EXPERTS, LAYER = "torchmoe expert_mlp", "torchmoe layer"
BOUND, BOUND_WITH_ACTIVATION = "six bmm", "bmm, activation"
FLUSH_BYTES = 2**28  # several times the L2 cache
AHEAD_CYCLES = 2_000_000  # a millisecond

# Each result is rounded to bfloat16 a few times on the way, by up to eps / 2 = 0.004 of itself.
AGREEMENT = 0.02


class Contender(NamedTuple):
    """A function of the routed tokens, and what gets a gradient; without leaves it has none."""

    name: str
    forward: Callable[[], Any]
    leaves: list[Tensor]
    backward: Callable[[Any], Any]


class Timing(NamedTuple):
    """Milliseconds."""

    forward: float
    backward: float


def differentiable(
    name: str, forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor
) -> Contender:
    """The backward pass is autograd's."""
    return Contender(
        name, forward, leaves, lambda y: torch.autograd.grad(y, leaves, grad, allow_unused=True)
    )


class Clock:
    """Times on the GPU, from a cold cache, with the host ahead."""

    def __init__(self) -> None:
        """Allocates what is overwritten before each run."""
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)

    def run(self, contender: Contender) -> Timing:
        """One forward and, where there are leaves, backward pass."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        events[0].record()
        y = contender.forward()
        events[1].record()
        if contender.leaves:
            contender.backward(y)
        events[2].record()
        torch.cuda.synchronize()
        return Timing(events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2]))

    def interleaved(self, contenders: Sequence[Contender], rounds: int) -> dict[str, list[Timing]]:
        """Every contender in every round, in an order that turns; two rounds warm up."""
        times: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
        for turn in range(-2, rounds):
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                timing = self.run(contender)
                if turn >= 0:
                    times[contender.name].append(timing)
        return times


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal values that require a gradient."""
    tensor = torch.randn(shape, device=DEVICE, dtype=DTYPE) * scale
    return tensor.requires_grad_()


def bounds(shape: Shape) -> list[Contender]:
    """Every expert with the same number of rows, which no routing has to find."""
    rows = -(-shape.tokens * shape.top_k // shape.experts)
    hidden, inner = shape.hidden, shape.intermediate
    x, w_in = drawn(shape.experts, rows, hidden), drawn(shape.experts, 2 * inner, hidden)
    w_out = drawn(shape.experts, hidden, inner)
    grad = torch.randn_like(x)
    act, pre = x.new_ones(shape.experts, rows, inner), x.new_ones(shape.experts, rows, 2 * inner)

    def with_activation() -> Tensor:
        gate, up = torch.bmm(x, w_in.mT).chunk(2, -1)
        return torch.bmm(silu(gate) * up, w_out.mT)

    @torch.no_grad()
    def forward() -> None:
        torch.bmm(x, w_in.mT)
        torch.bmm(act, w_out.mT)

    @torch.no_grad()
    def backward(y: None) -> None:
        del y
        torch.bmm(grad, w_out)
        torch.bmm(grad.mT, act)
        torch.bmm(pre, w_in)
        torch.bmm(pre.mT, x)

    return [
        Contender(BOUND, forward, [x], backward),
        differentiable(BOUND_WITH_ACTIVATION, with_activation, [x, w_in, w_out], grad),
    ]


def with_grouped_mm(
    x: Tensor, indices: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor
) -> Tensor:
    """The experts, as one writes them in torch."""
    experts = indices.flatten()
    order = experts.argsort()
    tokens = order // indices.shape[1]
    counts = torch.histc(experts.int(), bins=len(w_in), min=0, max=len(w_in) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, tokens)
    gate, up = torch._grouped_mm(rows, w_in.mT, offs=ends).chunk(2, -1)
    rows = torch._grouped_mm(silu(gate) * up, w_out.mT, offs=ends)
    weighted = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighted)


def of_the_layer(shape: Shape) -> tuple[list[Contender], dict[str, str]]:
    """Ours, the peers that work here, and why the others do not."""
    with torch.device(DEVICE):
        layer = our_layer(shape, DTYPE).module
    x = drawn(shape.tokens, shape.hidden)
    grad = torch.randn_like(x)
    scores = torch.rand(shape.tokens, shape.experts, device=DEVICE)
    weights, indices = scores.topk(shape.top_k)
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    w_in = layer.get_parameter("experts.gate_up_proj")
    w_out = layer.get_parameter("experts.down_proj")
    leaves = [x, weights, w_in, w_out]
    parameters = [x, *layer.parameters()]

    def ours() -> Tensor:
        return ops.expert_mlp(x, indices, weights, w_in, None, w_out, None, "swiglu")

    def whole() -> Tensor:
        y: Tensor = layer(x).hidden_states
        return y

    reference = differentiable(EXPERTS, ours, leaves, grad)
    found = [reference, differentiable(LAYER, whole, parameters, grad)]
    missing: dict[str, str] = {}

    def try_peer(name: str, make: Callable[[], list[Contender]]) -> None:
        try:
            first, *others = make()
            check_agreement(first, reference)
        except Exception as error:  # whatever a peer of another version does is its result
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            found.extend([first, *others])

    def transformers() -> list[Contender]:
        with torch.device(DEVICE):
            block: Any = mixtral_block(shape, layer, "grouped_mm").module
        experts = block.experts
        own = [x, weights, experts.gate_up_proj, experts.down_proj]
        # Its block gives the experts weights in the tokens' type.
        narrow = weights.detach().to(DTYPE).requires_grad_()
        own[1] = narrow
        return [
            differentiable("transformers experts", lambda: experts(x, indices, narrow), own, grad),
            differentiable(
                "transformers block",
                lambda: block(x.unsqueeze(0)).squeeze(0),
                [x, *block.parameters()],
                grad,
            ),
        ]

    def composition() -> list[Contender]:
        def forward() -> Tensor:
            return with_grouped_mm(x, indices, weights, w_in, w_out)

        return [differentiable("torch._grouped_mm", forward, leaves, grad)]

    try_peer("transformers", transformers)
    try_peer("torch._grouped_mm", composition)
    return found, missing


def check_agreement(peer: Contender, reference: Contender) -> None:
    """Output and gradients, except those of the weights, which a peer may round."""

    def results(contender: Contender) -> list[Tensor]:
        y = contender.forward()
        grads = contender.backward(y)
        return [y.detach(), grads[0], *grads[2:]]

    for name, actual, expected in zip(
        ("output", "gradient of x", "gradient of w_in", "gradient of w_out"),
        results(peer),
        results(reference),
        strict=True,
    ):
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        if not error.item() <= AGREEMENT:
            raise ArithmeticError(f"its {name} differs by {error.item():.3g} of its norm")


def saved_bytes(contender: Contender) -> int:
    """What the forward pass leaves allocated in addition to its output."""

    def requested() -> int:
        gc.collect()
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    contender.forward()  # may take workspaces that stay
    before = requested()
    y = contender.forward()
    own = y.numel() * y.element_size() if isinstance(y, Tensor) else 0
    return requested() - before - own


def measure_layer(shape: Shape, rounds: int, clock: Clock) -> dict[str, Any]:
    """Every contender on one shape."""
    contenders, missing = of_the_layer(shape)
    saved = {contender.name: saved_bytes(contender) for contender in contenders}
    times = clock.interleaved([*bounds(shape), *contenders], rounds)
    bound = summary(times[BOUND])
    fused = summary(times[BOUND_WITH_ACTIVATION])
    rows = {}
    for name, timings in times.items():
        row: dict[str, float] = summary(timings)
        total = row["forward_ms"] + row["backward_ms"]
        row["forward_tflops"] = shape.flops / 3 / row["forward_ms"] / 1e9
        row["backward_tflops"] = 2 * shape.flops / 3 / row["backward_ms"] / 1e9
        row["share"] = (bound["forward_ms"] + bound["backward_ms"]) / total
        row["share_with_activation"] = (fused["forward_ms"] + fused["backward_ms"]) / total
        if name in saved:
            row["saved_mib"] = saved[name] / 2**20
        rows[name] = row
    return {"shape": asdict(shape), "rows": rows, "missing": missing}


def summary(timings: Sequence[Timing]) -> dict[str, float]:
    """Medians and minima."""
    forward, backward = zip(*timings, strict=True)
    return {
        "forward_ms": statistics.median(forward),
        "forward_min_ms": min(forward),
        "backward_ms": statistics.median(backward),
        "backward_min_ms": min(backward),
    }


def routing_ops(shape: Shape) -> dict[str, Contender]:
    """Each routing op on logits as a router gives them."""
    logits = torch.randn(shape.tokens, shape.experts, device=DEVICE).requires_grad_()
    fixed = logits.detach()
    selected = ops.select_experts(fixed, shape.top_k)
    even = -(-shape.tokens * shape.top_k // shape.experts)
    capacity = torch.full((shape.experts,), even, device=DEVICE)
    normalize = "topk" if shape.top_k > 1 else "none"  # a single weight is always 1
    plan = ops.dispatch_plan(selected, shape.experts)
    fraction = plan.expert_offsets.diff() / selected.numel()
    x, rows = drawn(shape.tokens, shape.hidden), drawn(selected.numel(), shape.hidden)
    weights = torch.rand(selected.shape, device=DEVICE).requires_grad_()

    def no_gradient(forward: Callable[[], Any]) -> Contender:
        return Contender("", forward, [], lambda y: None)

    def gradient(forward: Callable[[], Tensor], *leaves: Tensor) -> Contender:
        return differentiable("", forward, list(leaves), torch.ones_like(forward().detach()))

    return {
        "select_experts": no_gradient(lambda: ops.select_experts(fixed, shape.top_k)),
        "gate_weights": gradient(
            lambda: ops.gate_weights(
                logits, selected, score_function="softmax", normalize=normalize, estimator="exact"
            ),
            logits,
        ),
        "limit_capacity drop": no_gradient(lambda: ops.limit_capacity(selected, capacity)),
        "limit_capacity next_best": no_gradient(
            lambda: ops.limit_capacity(selected, capacity, overflow="next_best", scores=fixed)
        ),
        "dispatch_plan": no_gradient(lambda: ops.dispatch_plan(selected, shape.experts)),
        "permute": gradient(lambda: ops.permute(x, plan), x),
        "unpermute": gradient(lambda: ops.unpermute(rows, weights, plan), rows, weights),
        "load_balancing_loss": gradient(
            lambda: ops.load_balancing_loss(logits, fraction, score_function="softmax"), logits
        ),
        "router_z_loss": gradient(lambda: ops.router_z_loss(logits), logits),
        "mean_over_tokens": gradient(lambda: ops.mean_over_tokens(logits), logits),
    }


def bytes_moved(shape: Shape) -> dict[str, tuple[int, int]]:
    """Of every routing op forward and backward: what it must read and write, once."""
    slots, hidden = shape.tokens * shape.top_k, 2 * shape.hidden
    logits, ids, weights = 4 * shape.tokens * shape.experts, 8 * slots, 4 * slots
    plan = 8 * (shape.experts + 1) + 2 * ids
    tokens, rows = shape.tokens * hidden, slots * hidden
    table = 8 * shape.experts
    return {
        "select_experts": (logits + ids, 0),
        "gate_weights": (logits + ids + weights, 2 * logits + ids + weights),
        "limit_capacity drop": (2 * ids + table, 0),
        "limit_capacity next_best": (2 * ids + table + logits, 0),
        "dispatch_plan": (ids + plan, 0),
        "permute": (tokens + plan + rows, rows + plan + tokens),
        "unpermute": (rows + weights + plan + tokens, tokens + 2 * (rows + weights) + plan),
        "load_balancing_loss": (logits, 2 * logits),
        "router_z_loss": (logits, 2 * logits),
        "mean_over_tokens": (logits, logits),
    }


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second of a copy of 1 GiB, read and write."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = Contender("copy", lambda: target.copy_(source), [], lambda y: None)
    timings = clock.interleaved([copy], 10)["copy"]
    return 2e3 * source.numel() / statistics.median(timing.forward for timing in timings)


def measure_routing(
    shape: Shape, rounds: int, clock: Clock, bandwidth: float
) -> dict[str, dict[str, float]]:
    """Every routing op on one shape."""
    moved = bytes_moved(shape)
    named = [contender._replace(name=name) for name, contender in routing_ops(shape).items()]
    times = clock.interleaved(named, rounds)
    rows: dict[str, dict[str, float]] = {}
    for name, timings in times.items():
        row = summary(timings)
        forward, backward = moved[name]
        row["forward_mb"] = forward / 1e6
        row["forward_share"] = 1e3 * forward / row["forward_ms"] / bandwidth
        if backward:
            row["backward_mb"] = backward / 1e6
            row["backward_share"] = 1e3 * backward / row["backward_ms"] / bandwidth
        else:
            del row["backward_ms"], row["backward_min_ms"]
        rows[name] = row
    return rows


def table(rows: dict[str, dict[str, float]], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown; a column is a title, a key and a format."""
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, row in rows.items():
        cells = (format(row[key], form) if key in row else "" for key, form in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LAYER_COLUMNS = {
    "forward ms": ("forward_ms", ".3f"),
    "min": ("forward_min_ms", ".3f"),
    "backward ms": ("backward_ms", ".3f"),
    "min ": ("backward_min_ms", ".3f"),
    "forward TFLOP/s": ("forward_tflops", ".0f"),
    "backward TFLOP/s": ("backward_tflops", ".0f"),
    "share of six bmm": ("share", ".2f"),
    "of bmm, activation": ("share_with_activation", ".2f"),
    "saved MiB": ("saved_mib", ".1f"),
}
ROUTING_COLUMNS = {
    "forward ms": ("forward_ms", ".4f"),
    "min": ("forward_min_ms", ".4f"),
    "MB": ("forward_mb", ".2f"),
    "of copy": ("forward_share", ".2f"),
    "backward ms": ("backward_ms", ".4f"),
    "min ": ("backward_min_ms", ".4f"),
    "MB ": ("backward_mb", ".2f"),
    "of copy ": ("backward_share", ".2f"),
}


def environment() -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "torchmoe": torchmoe.__version__,
        "built with CUDA": torchmoe.build_info()["cuda"],
        "revision": torchmoe.build_info()["git_revision"],
        "transformers": transformers_version() or "not installed",
        "python": platform.python_version(),
    }


def driver_version() -> str:
    """As nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else "unknown"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_layer",
        description="Times the MoE layer and its routing ops on a GPU, in bfloat16.",
    )
    add_shape_option(parser, "five")
    parser.add_argument(
        "--rounds", type=positive, default=20, help="timed runs of each (default: 20)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and, on request, writes."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("cuda_layer: needs a GPU, and torch finds none", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    described = {**environment(), "rounds": str(args.rounds)}
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    clock = Clock()
    bandwidth = copy_bandwidth(clock)
    print(f"\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s")
    results = []
    for shape in args.shape or SHAPES:
        found = measure_layer(shape, args.rounds, clock)
        gc.collect()
        torch.cuda.empty_cache()
        found["routing"] = measure_routing(shape, args.rounds, clock, bandwidth)
        print(f"\n### T, H, I, E, K = {', '.join(str(size) for size in asdict(shape).values())}\n")
        print(table(found["rows"], LAYER_COLUMNS))
        for name, reason in found["missing"].items():
            print(f"\nnote: {name} is not timed: {reason}")
        print("\n" + table(found["routing"], ROUTING_COLUMNS), flush=True)
        results.append(found)
    if args.json:
        report = {"environment": described, "copy_bytes_per_s": bandwidth, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {args.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How well does `plan_offload` predict the time of a step?

Run it as `python -m benchmarks.offload.prediction`. Layers with offloaded experts run one after
the other on fresh random tokens, with each budget, number of tokens and with and without `link`.
What is timed is the experts' part, without the routers. Just before, `measure_machine` measures the
machine; the plan knows nothing else but the sizes, the budget, and that the experts are used
evenly. The ratio is the predicted time over the mean of the measured ones; the last column is the
same with the share of reads that took place in place of the expected one.

A machine's speed changes from minute to minute, which a prediction cannot know: `measure_machine`
runs anew before each budget, and where its numbers differ much, the ratios say little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import positive
from benchmarks.machine import machine as described
from torchmoe.nn import Experts, MoE
from torchmoe.offload import (
    Machine,
    OffloadedExperts,
    link,
    measure_machine,
    offload,
    plan_offload,
    write_store,
)
from torchmoe.offload.layout import stored_sizes

LAYERS = 3
BUDGETS = (25, 50, 75, 100)  # percent of the experts' bytes
TOKENS = (1, 16, 256, 2048)
SECONDS, FEWEST, MOST = 0.5, 4, 60  # of measuring a setting, and its steps
CLOSE = 0.25  # a prediction within this share of the measured time


@dataclass(frozen=True)
class Size:
    """Of the experts of a layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads "H,I,E,K"."""
        fields = text.split(",")
        if len(fields) != 4 or not all(field.isdecimal() and int(field) > 0 for field in fields):
            raise argparse.ArgumentTypeError(f"must be four integers H,I,E,K, got {text!r}")
        return cls(*map(int, fields))

    def make(self, device: str = "cpu") -> Experts:
        """Frozen experts."""
        experts = Experts(self.hidden, self.intermediate, self.experts, device=device)
        return experts.requires_grad_(False)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ",".join(map(str, asdict(self).values()))


SIZES = (Size(256, 512, 32, 2), Size(512, 1024, 16, 2))


@dataclass(frozen=True)
class Result:
    """One setting; times in seconds of a step of all layers."""

    size: str
    budget: int
    tokens: int
    linked: bool
    measured: float
    predicted: float
    hit_rate: float
    expected_hit_rate: float
    predicted_with_hit_rate: float

    @property
    def ratio(self) -> float:
        """Of the predicted time to the measured one."""
        return self.predicted / self.measured

    @property
    def ratio_with_hit_rate(self) -> float:
        """The same where the hit rate is known."""
        return self.predicted_with_hit_rate / self.measured


class Layers(nn.Module):
    """Layers of offloaded experts in the residual stream, and the seconds that the experts take."""

    def __init__(self, size: Size, stores: list[Path], budget: int) -> None:
        """Opens a store for each layer."""
        super().__init__()
        self.layers = nn.ModuleList(
            MoE(
                size.hidden,
                None,
                size.experts,
                size.top_k,
                experts=offload(size.make("meta"), budget=budget, store=store),
            ).requires_grad_(False)
            for store in stores
        )
        self.seconds = 0.0
        for experts in self.experts:
            experts.warm(torch.ones(size.experts))
            experts.register_forward_pre_hook(self._begin)
            experts.register_forward_hook(self._end)

    @property
    def experts(self) -> list[OffloadedExperts]:
        """Of each layer."""
        return [part for part in self.modules() if isinstance(part, OffloadedExperts)]

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layers on tokens [T, H]."""
        for layer in self.layers:
            x = x + layer(x).hidden_states
        return x

    def _begin(self, *_: object) -> None:
        self.seconds -= time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter()


def measure(
    size: Size, stores: list[Path], percent: int, tokens: int, linked: bool, machine: Machine
) -> Result:
    """Runs one setting and predicts it."""
    meta = size.make("meta")
    expert_bytes, window_bytes = stored_sizes("prediction", meta)
    # What reading needs comes on top, so that the percentage is that of the residents.
    budget = percent * size.experts // 100 * expert_bytes + window_bytes
    model = Layers(size, stores, budget)
    if linked:
        link(model.layers)
    seconds = []
    with torch.inference_mode():
        for step in range(-2, MOST):
            if step == 0:
                for experts in model.experts:
                    experts.reset_counters()
            model.seconds = 0.0
            model(torch.randn(tokens, size.hidden))
            if step >= 0:
                seconds.append(model.seconds)
            if step >= FEWEST and sum(seconds) > SECONDS:
                break
    needed = sum(experts.hits + experts.misses for experts in model.experts)
    read = sum(experts.bytes_read for experts in model.experts) / expert_bytes
    hit_rate = max(0.0, 1 - read / needed)
    options: dict[str, Any] = {
        "num_tokens": tokens,
        "top_k": size.top_k,
        "budget": budget,
        "num_layers": LAYERS,
        "prefetch": linked,
        **machine._asdict(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that reading does not hide is in the table
        plan = plan_offload(meta, **options)
        known = plan_offload(meta, **options, hit_rate=hit_rate)
    return Result(
        size=str(size),
        budget=percent,
        tokens=tokens,
        linked=linked,
        measured=statistics.mean(seconds),
        predicted=plan.step_time,
        hit_rate=hit_rate,
        expected_hit_rate=plan.hit_rate,
        predicted_with_hit_rate=known.step_time,
    )


def described_machine(machine: Machine) -> str:
    """One line."""
    return (
        f"{machine.bandwidth / 1e9:.2f} GB/s from the store, {machine.memory_bandwidth / 1e9:.1f} "
        f"GB/s from memory, {machine.flops / 1e9:.0f} GFLOP/s, {1e6 * machine.overhead:.0f} us a "
        f"call, overlap {machine.overlap:.2f}"
    )


HEAD = (
    f"{'budget':>6} {'tokens':>6} {'link':>4} {'measured':>12} {'predicted':>12} {'ratio':>6} "
    f"{'hit rate':>15} {'known':>6}"
)


def row(result: Result) -> str:
    """One line of the table."""
    return (
        f"{result.budget:>4} % {result.tokens:>6} {'yes' if result.linked else 'no':>4} "
        f"{1e3 * result.measured:>9.3f} ms {1e3 * result.predicted:>9.3f} ms "
        f"{result.ratio:>6.2f} {result.hit_rate:>6.2f} for {result.expected_hit_rate:.2f} "
        f"{result.ratio_with_hit_rate:>6.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload.prediction",
        description="Compares plan_offload with the time that offloaded experts take.",
    )
    parser.add_argument(
        "--size", type=Size.parse, action="append", metavar="H,I,E,K",
        help=f"of a layer; may be repeated (default: {' and '.join(map(str, SIZES))})",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive, action="append", help=f"may be repeated (default: {TOKENS})"
    )
    parser.add_argument(
        "--budget", type=positive, action="append", metavar="PERCENT",
        help=f"of the experts' bytes; may be repeated (default: {BUDGETS})",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(*(f"{name}: {value}" for name, value in described().items()), sep="; ")
    results = []
    for size in options.size or SIZES:
        with tempfile.TemporaryDirectory(prefix="torchmoe-offload-", dir=options.folder) as folder:
            stores = [Path(folder, f"{layer}.safetensors") for layer in range(LAYERS)]
            for store in stores:
                write_store(store, size.make())
            print(f"\n{LAYERS} layers with H,I,E,K = {size}")
            for percent in options.budget or BUDGETS:
                machine = measure_machine(size.make("meta"), folder=folder)
                print(described_machine(machine), HEAD, sep="\n")
                for tokens in options.tokens or TOKENS:
                    for linked in (False, True):
                        results.append(measure(size, stores, percent, tokens, linked, machine))
                        print(row(results[-1]), flush=True)
    close = sum(abs(result.ratio - 1) <= CLOSE for result in results)
    known = sum(abs(result.ratio_with_hit_rate - 1) <= CLOSE for result in results)
    print(
        f"\n{close} of {len(results)} predictions are within {CLOSE:.0%} of the measured time, "
        f"{known} where the hit rate is known"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

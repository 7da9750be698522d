"""Which residents to keep while a language model writes byte by byte?

Run it as `python -m benchmarks.offload.policies`. The language model of examples/train_lm.py learns
for a short while, with more experts than by default. Then it reads held-out text, and what enters
each of its layers of experts is recorded: byte by byte, these are the calls of a model that writes
the text. Copies of the layers with offloaded experts go through them, one byte and one layer at a
time, for each policy and budget. Their outputs must be those of the model, bit for bit.

Each budget holds a share of a layer's experts. "hit rate" is the share of the experts needed that
were in memory, over all layers; "read" what was read for a byte. The residents at the beginning are
the experts that the text before used most. The policy "oracle" knows the text that comes and is the
bound of every policy. In the last lines `link` predicts each layer's experts from the layer before;
"predicted" is the share of the experts needed that it foresaw.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_lm
from benchmarks.contenders import positive
from benchmarks.machine import machine as described
from torchmoe.nn import Experts, MoE
from torchmoe.offload import OffloadedExperts, link, offload, write_store
from torchmoe.offload.layout import stored_sizes
from training import batches
from training.corpus import Text
from training.job import Job
from training.language_model import bits
from training.parallel import ALONE
from training.settings import Settings

POLICIES = ("usage", "lru", "lfu", "oracle")
BUDGETS = (25, 50, 75)
SECONDS, BYTES = 30.0, 1500  # of learning, and of text that is measured
SETTINGS = Settings(experts=32, intermediate_size=256, hidden_size=128, layers=4)


@dataclass(frozen=True)
class Recorded:
    """One layer, what entered it, what it gave, and the experts that it chose."""

    layer: MoE
    x: Tensor  # [T, H]
    y: Tensor  # [T, H]
    indices: Tensor  # [T, K]


@dataclass(frozen=True)
class Result:
    """One policy with one budget."""

    budget: int
    policy: str
    linked: bool
    hit_rate: float
    kilobytes_read: float  # for a byte of text
    bytes_per_second: float
    predicted: float | None


def learn(text: Text, settings: Settings, seconds: float) -> Job:
    """Trains for so long; the learning rate is that of a run of the same length."""
    job = train_lm.new_job(settings)
    job.model.train()
    begin = time.perf_counter()
    while (share := (time.perf_counter() - begin) / seconds) < 1:
        batch = batches.next_batch(text, job.progress.step, settings, ALONE)
        lr = train_lm.learning_rate(job, share)
        step = train_lm.optimizer_step(job, job.model, batch, lr, ALONE)
    loss = bits(step.losses.mean().item())
    print(f"{job.progress.step} steps of training, {loss:.2f} bits per byte")
    job.model.eval().requires_grad_(False)
    return job


@torch.inference_mode()
def record(job: Job, text: Text, count: int) -> list[Recorded]:
    """Lets the model read the beginnings of the held-out texts, and looks at its layers."""
    context = job.settings.context
    held_out = list(text.held_out.values())
    windows = -(-count // context)
    if min(map(len, held_out)) < -(-windows // len(held_out)) * context:
        raise SystemExit(f"policies: the held-out text is too short for {count} bytes")
    tokens = torch.stack(
        [
            held_out[number % len(held_out)][number // len(held_out) * context :][:context]
            for number in range(windows)
        ]
    ).long()
    inputs: list[Tensor] = []
    handles = [
        moe.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for moe in job.model.moes
    ]
    routings = job.model(tokens).routings
    for handle in handles:
        handle.remove()
    return [
        # A row alone gives the same bits as among others.
        Recorded(moe, x[:count], torch.cat([moe(row[None]).hidden_states for row in x[:count]]),
                 routing.indices[:count])
        for moe, x, routing in zip(job.model.moes, inputs, routings, strict=True)
    ]  # fmt: skip


def measure(
    layers: Sequence[Recorded],
    stores: Sequence[Path],
    percent: int,
    policy: str,
    linked: bool,
) -> Result:
    """Goes through the recorded calls with a policy and a budget."""
    copies = [
        offloaded_copy(recorded, store, percent, policy)
        for recorded, store in zip(layers, stores, strict=True)
    ]
    experts = [cast(OffloadedExperts, layer.experts) for layer in copies]
    if linked:
        link(copies)
    begin_at = warm_up_bytes(layers)
    for recorded, part in zip(layers, experts, strict=True):
        used = recorded.indices[:begin_at].flatten().bincount(minlength=part.num_experts)
        part.warm(used / used.sum())
        part.reset_counters()
    count = len(layers[0].x)
    entering = [(layer, recorded.x) for layer, recorded in zip(copies, layers, strict=True)]
    begin = time.perf_counter()
    with torch.inference_mode():
        outputs = [
            [layer(x[t : t + 1]).hidden_states for layer, x in entering]
            for t in range(begin_at, count)
        ]
    seconds = time.perf_counter() - begin
    for number, recorded in enumerate(layers):
        found = torch.cat([output[number] for output in outputs])
        if not torch.equal(found, recorded.y[begin_at:]):
            raise SystemExit(f"policies: {policy} gives another output in layer {number}")
    hits, misses = (sum(getattr(part, name) for part in experts) for name in ("hits", "misses"))
    read = sum(part.bytes_read for part in experts)
    rates = [part.prediction_hit_rate for part in experts[1:]]
    return Result(
        budget=percent,
        policy=policy,
        linked=linked,
        hit_rate=hits / (hits + misses),
        kilobytes_read=read / (count - begin_at) / 1e3,
        bytes_per_second=(count - begin_at) / seconds,
        predicted=sum(rates) / len(rates) if linked else None,
    )


def warm_up_bytes(layers: Sequence[Recorded]) -> int:
    """The text before the one that is measured."""
    return len(layers[0].x) // 3


def offloaded_copy(recorded: Recorded, store: Path, percent: int, policy: str) -> MoE:
    """The layer with its experts in the file, of which a share can be resident."""
    layer = copy.deepcopy(recorded.layer)
    experts = cast(Experts, layer.experts).to("meta")
    expert_bytes, window_bytes = stored_sizes("policies", experts)
    calls = list(recorded.indices[warm_up_bytes([recorded]) :])
    layer.experts = offload(
        experts,
        budget=percent * experts.num_experts // 100 * expert_bytes + window_bytes,
        store=store,
        policy=policy,
        trace=calls if policy == "oracle" else None,
    )
    return layer


HEAD = (
    f"{'budget':>6} {'policy':<8} {'link':>4} {'hit rate':>8} {'read':>10} {'bytes/s':>8} "
    f"{'predicted':>9}"
)


def row(result: Result) -> str:
    """One line of the table."""
    predicted = "" if result.predicted is None else f"{result.predicted:.3f}"
    return (
        f"{result.budget:>4} % {result.policy:<8} {'yes' if result.linked else 'no':>4} "
        f"{result.hit_rate:>8.3f} {result.kilobytes_read:>7.0f} kB {result.bytes_per_second:>8.1f} "
        f"{predicted:>9}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload.policies",
        description="Measures the hit rate of each policy while a language model writes.",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of learning")
    parser.add_argument("--bytes", type=positive, default=BYTES, help="of text, a third to begin")
    parser.add_argument(
        "--budget", type=positive, action="append", metavar="PERCENT",
        help=f"of a layer's experts; may be repeated (default: {BUDGETS})",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", default=[], help="text, as of examples/train_lm.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(arguments)
    print(*(f"{name}: {value}" for name, value in described().items()), sep="; ")
    text = Text.load(options.data)
    job = learn(text, SETTINGS, options.seconds)
    layers = record(job, text, options.bytes)
    results = []
    with tempfile.TemporaryDirectory(prefix="torchmoe-offload-") as folder:
        stores = [Path(folder, f"{number}.safetensors") for number in range(len(layers))]
        for recorded, store in zip(layers, stores, strict=True):
            write_store(store, cast(Experts, recorded.layer.experts))
        print(f"{len(layers)} layers of {SETTINGS.experts} experts, {options.bytes} bytes\n{HEAD}")
        for percent in options.budget or BUDGETS:
            for policy, linked in [*((policy, False) for policy in POLICIES), ("usage", True)]:
                results.append(measure(layers, stores, percent, policy, linked))
                print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

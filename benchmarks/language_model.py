"""How fast does the language model of `make train` train, and where does a step's time go?

Run it as `python -m benchmarks.language_model`. Full optimizer steps of examples/train_lm.py with
its default settings are timed side by side, on the same bytes from the same initial weights:

- torchmoe: the model as the example has it;
- grouped_mm, eager: the same with the Mixtral block of Hugging Face Transformers in place of every
  experts' layer, with either of its implementations, where Transformers is installed;
- loop: the same with the loop over the experts that a textbook writes in plain PyTorch;
- dense: the example's `--feed-forward dense`, a network of equal active parameters and no routing.

No contender limits an expert's capacity, which the peers do not know (the example's default), and
all but dense add the same balancing loss to the task's, the peers by three lines of plain PyTorch.
Before a peer is timed it is shown to give the loss and the gradients that torchmoe gives, at the
weights of the first steps. What the example does between its steps (watching the experts, metrics
and display, see `benchmarks.training_overhead`) is left out.

A machine's speed changes from minute to minute, so every round trains every contender for a few
steps, in an order that turns by one each round, and only ratios of the same run are worth quoting.
The last column of the first table is the training loss of the last round: who computes the same
learns the same. The second table says which parts of the program take how much of torchmoe's step,
which takes some percent longer while torch.profiler looks on. Like `make train`, the process keeps
the memory that it frees (`torchmoe.keep_freed_memory`), for every contender.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torchmoe
import train_lm
from benchmarks import markdown
from benchmarks.clock import Times
from benchmarks.contenders import (
    OURS,
    TRANSFORMERS,
    PlainLoop,
    Shape,
    loop_over_experts,
    mixtral_block,
    named_gradients,
    positive,
    transformers_version,
)
from benchmarks.machine import machine
from benchmarks.step_profile import PartTime, profile_steps
from torchmoe.nn import MoE
from train_lm import BALANCE_WEIGHT, ByteLM
from training import batches
from training.checkpoint import Progress
from training.corpus import Text
from training.job import Job
from training.language_model import LanguageModel, LMOutput, bits
from training.metrics import Step
from training.parallel import ALONE
from training.settings import ModelConfig, Settings

LOOP, DENSE = "loop", "dense"
WARM_UP_STEPS = 3
PROFILED_STEPS = 10

# The head starts at zero and lets no gradient through in the first step, which checks little.
CHECKED_STEPS = 3
# A peer adds the same values in another order, so a sum of n terms may differ by sqrt(n) * eps of
# the largest element, as a random walk does (n * eps at worst). Four such sums follow one another
# in a layer (router, W_in, W_out and their backward), and the layers follow one another.
AGREEMENT = 4

PEERS = (*TRANSFORMERS, LOOP)
CONTENDERS = (OURS, *PEERS, DENSE)


# ---- the peers


class PeerLayer(nn.Module):
    """What takes the place of an experts' layer, with its weights and its balancing loss."""

    block: nn.Module
    aux_loss: Tensor

    def __init__(self, block: nn.Module) -> None:
        """Takes a peer of `contenders`, which has the weights."""
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Works on each byte alone, [B, S, H] to the same, and keeps the weighted loss."""
        y, probs, indices = self.compute(x.flatten(0, -2))
        num_experts = probs.shape[-1]
        fraction = torch.bincount(indices.flatten(), minlength=num_experts) / indices.numel()
        self.aux_loss = BALANCE_WEIGHT * num_experts * (fraction * probs.mean(dim=0)).sum()
        return y.view_as(x)

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From x [T, H]: y [T, H], the router's probabilities [T, E] and its choices [T, K]."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor | None]:
        """Every parameter's gradient, named and stacked as torchmoe's layer has it."""
        found = named_gradients(self.block)
        return {name.replace("gate.weight", "router.weight"): grad for name, grad in found}


class MixtralLayer(PeerLayer):
    """The block of Transformers: its own forward pass, whose router is looked at."""

    block: Any

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routes and computes."""
        logits, weights, indices = self.block.gate(x)
        return self.block.experts(x, indices, weights), logits.softmax(dim=-1), indices


class LoopLayer(PeerLayer):
    """The loop of a textbook, whose router is looked at."""

    block: PlainLoop

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routes and computes."""
        probs = functional.linear(x, self.block.router).softmax(dim=-1)  # [T, E]
        weights, indices = probs.topk(self.block.top_k, dim=-1)  # [T, K] each
        weights = weights / weights.sum(dim=-1, keepdim=True)
        w_in, w_out = list(self.block.w_in), list(self.block.w_out)
        return loop_over_experts(x, indices, weights, w_in, w_out), probs, indices


def make_peer(name: str, config: ModelConfig, moe: MoE) -> PeerLayer:
    """The peer of that name with the weights of `moe`."""
    if name == LOOP:
        return LoopLayer(PlainLoop(moe))
    shape = Shape(
        config.context, config.hidden_size, config.intermediate_size, config.experts, config.top_k
    )
    return MixtralLayer(mixtral_block(shape, moe, name).module)


class PeerLM(ByteLM):
    """The language model with a peer in place of every experts' layer."""

    def __init__(self, ours: LanguageModel, name: str) -> None:
        """Copies the weights of `ours`."""
        super().__init__(ours.config)
        self.load_state_dict(ours.state_dict())
        self.peers: list[PeerLayer] = []
        for block, moe in zip(self.blocks, self.moes, strict=True):
            peer = make_peer(name, ours.config, moe)
            block.feed_forward = peer
            self.peers.append(peer)

    def forward(self, tokens: Tensor) -> LMOutput:
        """Scores every next byte, and adds up the losses that the layers keep."""
        output = super().forward(tokens)
        return output._replace(aux_loss=torch.stack([peer.aux_loss for peer in self.peers]).sum())

    def gradients(self) -> dict[str, Tensor | None]:
        """Every parameter's gradient, named as in `ours`."""
        found = {name: parameter.grad for name, parameter in self.named_parameters()}
        found = {name: grad for name, grad in found.items() if ".feed_forward." not in name}
        for number, peer in enumerate(self.peers):
            for name, grad in peer.gradients().items():
                found[f"blocks.{number}.feed_forward.{name}"] = grad
        return found


# ---- before: the same computation


def our_job(settings: Settings) -> Job:
    """What `make train` begins with."""
    job = train_lm.new_job(settings)
    job.model.train()
    return job


def with_peer(job: Job, name: str) -> Job:
    """A job of its own from the same weights, with a peer in place of every experts' layer."""
    model = PeerLM(job.model, name)
    model.train()
    optimizer = train_lm.make_optimizer(model, job.settings.lr)
    return replace(job, model=model, optimizer=optimizer, progress=Progress(), watcher=None)


def train_a_step(job: Job, text: Text) -> Step:
    """One step of the example, at the learning rate of its schedule."""
    batch = batches.next_batch(text, job.progress.step, job.settings, ALONE)
    lr = train_lm.learning_rate(job, job.share)
    return train_lm.optimizer_step(job, job.model, batch, lr, ALONE)


def check_agreement(name: str, text: Text, settings: Settings) -> dict[str, float]:
    """Shows that a peer computes what torchmoe computes: the loss and the gradients of a step.

    At the weights that torchmoe's first steps lead to, so that no difference grows from step to
    step.

    Returns:
        The largest differences of the loss and of a gradient, over the largest element, and what
        they may be.
    """
    job = our_job(settings)
    config = job.model.config
    longest = max(config.hidden_size, 2 * config.intermediate_size, settings.batch_tokens)
    eps = torch.finfo(torch.float32).eps
    bound = AGREEMENT * config.layers * math.sqrt(longest * config.top_k) * eps
    worst = {"loss": 0.0, "gradient": 0.0}
    for _ in range(CHECKED_STEPS):
        peer = PeerLM(job.model, name)
        peer.train()
        expected, actual = (results(model, job, text) for model in (job.model, peer))
        if expected.keys() != actual.keys():
            raise SystemExit(f"{name} has {sorted(actual)}, {OURS} has {sorted(expected)}")
        for what, value in expected.items():
            largest = value.abs().max().item()
            error = (actual[what] - value).abs().max().item()
            if not error <= bound * largest:
                raise SystemExit(
                    f"{name}: {what} differs by {error:.3g}, more than {bound * largest:.3g} "
                    "(two experts that are as good as equal for a byte do that: try another --seed)"
                )
            kind = "loss" if what == "loss" else "gradient"
            worst[kind] = max(worst[kind], error / largest if largest else 0.0)
        train_a_step(job, text)
    return {**worst, "bound": bound}


def results(model: LanguageModel, job: Job, text: Text) -> dict[str, Tensor]:
    """The loss and all gradients of the job's next step, which is not made."""
    inputs, targets, _ = batches.next_batch(text, job.progress.step, job.settings, ALONE)
    output: LMOutput = model(inputs)
    loss = model.loss_per_row(output.logits, targets).mean() + output.aux_loss
    torch.autograd.backward([loss])
    if isinstance(model, PeerLM):
        gradients = model.gradients()
    else:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


# ---- time


@dataclass
class Contender:
    """One way to compute the model, and how it went."""

    name: str
    job: Job
    times: Times = field(default_factory=lambda: Times([]))
    """Of each timed step."""
    loss: float = math.nan
    """Nats per byte, the mean of the last round."""

    def train(self, text: Text, steps: int) -> None:
        """A round."""
        losses = []
        for _ in range(steps):
            begin = time.perf_counter()
            step = train_a_step(self.job, text)
            self.times.seconds.append(time.perf_counter() - begin)
            losses.append(step.losses.mean())
        self.loss = torch.stack(losses).mean().item()


def make_contender(name: str, settings: Settings) -> Contender:
    """A new one; those of one seed start from the same weights, except for the dense one."""
    if name == DENSE:
        return Contender(name, our_job(replace(settings, feed_forward="dense")))
    job = our_job(settings)
    return Contender(name, job if name == OURS else with_peer(job, name))


def measure(
    names: Sequence[str], text: Text, settings: Settings, rounds: int, steps: int
) -> list[Contender]:
    """Times `steps` steps of every contender in each round."""
    contenders = [make_contender(name, settings) for name in names]
    for contender in contenders:
        contender.train(text, WARM_UP_STEPS)
        contender.times.seconds.clear()
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.train(text, steps)
    return contenders


def summarize(contenders: list[Contender], settings: Settings) -> dict[str, dict[str, float]]:
    """Times, speeds, and ratios to torchmoe's times."""
    tokens = settings.rows * settings.context
    ours = next(contender.times for contender in contenders if contender.name == OURS)
    rows = {}
    for contender in contenders:
        times = contender.times
        rows[contender.name] = {
            "min_ms": 1e3 * times.low,
            "median_ms": 1e3 * times.middle,
            "max_bytes_per_second": tokens / times.low,
            "median_bytes_per_second": tokens / times.middle,
            "min_over_ours": times.low / ours.low,
            "median_over_ours": times.middle / ours.middle,
            "bits_per_byte": bits(contender.loss),
        }
    return rows


# ---- what is shown


@dataclass(frozen=True)
class Table:
    """A title, and lines whose first cell is a name and whose others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> None:
        """Prints it, aligned."""
        print(f"\n{self.title}\n")
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *numbers in lines:
            aligned = map(str.rjust, numbers, widths[1:])
            print("  ".join(["", name.ljust(widths[0]), *aligned]))

    def markdown(self) -> str:
        """The same for a document."""
        return f"{self.title}\n\n{markdown.table(self.header, self.rows)}\n"


def speed_table(summary: dict[str, dict[str, float]], rounds: int, steps: int) -> Table:
    """The contenders."""
    header = ["", "min ms", "median ms", "bytes/s, best", "bytes/s, median"]
    header += ["min / ours", "median / ours", "bits per byte"]
    formats = (".1f", ".1f", ",.0f", ",.0f", ".2f", ".2f", ".3f")
    rows = [
        [name, *(format(value, how) for value, how in zip(row.values(), formats, strict=True))]
        for name, row in summary.items()
    ]
    return Table(f"Training steps, {rounds} rounds of {steps}:", header, rows)


def profile_table(parts: list[PartTime]) -> Table:
    """The parts of torchmoe's step."""
    total = sum(part.ms for part in parts)
    rows = []
    for part in parts:
        passes = (f"{part.other_ms:.2f}", f"{part.backward_ms:.2f}") if part.in_model else ("", "")
        rows.append([part.part, *passes, f"{part.ms:.2f}", f"{100 * part.ms / total:.1f} %"])
    rows.append(["a step", "", "", f"{total:.2f}", "100 %"])
    title = f"A step of {OURS}, mean of {PROFILED_STEPS} under torch.profiler:"
    return Table(title, ("", "forward ms", "backward ms", "ms", "share"), rows)


def environment(settings: Settings) -> dict[str, str | int]:
    """What a reader needs to judge the numbers."""
    return {
        **machine(),
        "layers": settings.layers,
        "hidden": settings.hidden_size,
        "intermediate": settings.intermediate_size,
        "experts": settings.experts,
        "top_k": settings.top_k,
        "windows": f"{settings.rows} x {settings.context} bytes",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model",
        description="Times training steps of the language model of `make train` next to peers.",
    )
    parser.add_argument(
        "--contender",
        choices=CONTENDERS,
        action="append",
        help=f"who is timed besides {OURS}; may be repeated (default: all)",
    )
    parser.add_argument("--steps", type=positive, default=5, help="in a round (default: 5)")
    parser.add_argument("--rounds", type=positive, default=8, help="of all (default: 8)")
    parser.add_argument(
        "--threads", type=positive, help="threads of torch (default: torch's own choice)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and bytes (default: 0)")
    parser.add_argument(
        "--profile-only", action="store_true", help="only where torchmoe's step goes, no times"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the tables there")
    args = parser.parse_args(argv)
    if args.profile_only and args.contender:
        parser.error("--profile-only must not be given with --contender")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and, on request, writes."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torchmoe.keep_freed_memory()
    version = transformers_version()
    settings = Settings(seed=args.seed)
    described = environment(settings)
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    text = Text.load([])
    report: dict[str, object] = {"environment": described}
    tables = []

    if not args.profile_only:
        names = [name for name in CONTENDERS if name in (OURS, *(args.contender or CONTENDERS))]
        if version is None and (missing := [name for name in names if name in TRANSFORMERS]):
            print(f"note: Transformers is not installed; not timed: {', '.join(missing)}")
            names = [name for name in names if name not in missing]
        agreement = {}
        for name in names:
            if name in PEERS:
                agreement[name] = found = check_agreement(name, text, settings)
                differences = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
                print(f"{name} computes the same; differences over largest elements: {differences}")
        contenders = measure(names, text, settings, args.rounds, args.steps)
        summary = summarize(contenders, settings)
        tables.append(speed_table(summary, args.rounds, args.steps))
        tables[-1].show()
        seconds = {contender.name: contender.times.seconds for contender in contenders}
        report |= {"agreement": agreement, "summary": summary, "seconds": seconds}

    job = our_job(settings)
    for _ in range(WARM_UP_STEPS):
        train_a_step(job, text)
    parts = profile_steps(job, lambda: train_a_step(job, text), PROFILED_STEPS)
    tables.append(profile_table(parts))
    tables[-1].show()
    report["profile"] = [asdict(part) for part in parts]

    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join(table.markdown() for table in tables))


if __name__ == "__main__":
    main()

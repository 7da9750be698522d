"""Trains a mixture-of-experts language model on real text and tells how well it learned.

The model reads bytes and predicts the next one. While it trains, each line shows the loss in bits
per byte, the speed, how evenly the experts are used and how much of the work was dropped. At the
end it is measured on text that it has not seen, writes some of its own, and is saved.
"""

# Read in this order: run() below, lm/model.py, lm/corpus.py with lm/cleaning.py, lm/settings.py,
# lm/checkpoint.py.

from __future__ import annotations

import io
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from lm import checkpoint, corpus
from lm.model import ByteLM, LMOutput, generate, task_loss
from lm.settings import Settings, SettingsError, combine, make_parser

LINES = 25  # progress lines per run
WARM_UP_STEPS = 100
FINAL_LR_SHARE = 0.1  # the cosine ends there
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
HELD_OUT_WINDOWS = 256  # per domain, evenly spread over its held-out text
PROMPT_BYTES = 64
SAMPLE_BYTES = 240
TEMPERATURE = 0.7


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, runs, and turns what the user can mend into one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    parser = make_parser(__doc__ or "")
    given = vars(parser.parse_args(arguments))
    try:
        return run(given)
    except (SettingsError, corpus.CorpusError, checkpoint.CheckpointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        return 130


def run(given: dict[str, object]) -> int:
    """The whole program: text, model, training, checkpoint, held-out loss, sample."""
    # 1. Settings, and the weights to start from.
    weights, saved, steps_done = None, None, 0
    if "load" in given:
        weights, saved, steps_done = checkpoint.load(Path(str(given["load"])))
    settings = combine(given, saved)
    path = Path(settings.out) / "model.safetensors"
    trains = settings.steps != 0
    if trains:
        checkpoint.check_writable(path)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    # 2. Text.
    domains = corpus.load(list(settings.data))
    train = {domain.name: domain.train_bytes() for domain in domains}
    held_out = {domain.name: domain.held_out_bytes() for domain in domains}
    describe(domains, train, held_out, settings.context)

    # 3. Model.
    model = ByteLM(settings.model())
    if weights is not None:
        checkpoint.fill(model, weights, str(settings.load))
        print(f"loaded: {settings.load}, trained for {steps_done} steps")
    total, active = model.count_parameters()
    print(
        f"model: {settings.layers} layers, top {settings.top_k} of {settings.experts} experts, "
        f"{total:,} parameters, {active:,} at work on a byte, {torch.get_num_threads()} threads"
    )

    # 4. Training, saved before anything else can go wrong.
    if trains:
        texts = list(train.values())
        steps_done, interrupted = train_model(model, texts, settings, steps_done)
        checkpoint.save(path, model.state_dict(), settings, steps_done)
        print(f"checkpoint after {steps_done} steps: {path}")
        if interrupted:
            print(f"interrupted; to train on: --load {path} --steps N")
            return 130

    # 5. What it learned.
    report(model, held_out, settings)
    return 0


def describe(
    domains: list[corpus.Domain],
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    context: int,
) -> None:
    """Prints what there is to read, and refuses what is too short to read."""
    width = max(len("domain"), *(len(domain.name) for domain in domains))
    print(f"{'domain':{width}s}  train bytes  files  held-out bytes  files")
    for domain in domains:
        sizes = len(train[domain.name]), len(held_out[domain.name])
        if min(sizes) <= context:
            raise corpus.CorpusError(
                f"{domain.name}: --context {context} needs more text than {sizes[0]} bytes to "
                f"train and {sizes[1]} held out"
            )
        print(
            f"{domain.name:{width}s}  {sizes[0]:11,d}  {len(domain.train):5d}  "
            f"{sizes[1]:14,d}  {len(domain.held_out):5d}"
        )


def train_model(
    model: ByteLM, domains: list[Tensor], settings: Settings, steps_done: int
) -> tuple[int, bool]:
    """Trains until the steps or the minutes are over.

    Gives all the steps of the model, those it came with included, and whether Ctrl-C was pressed.
    """
    generator = torch.Generator().manual_seed(settings.seed + steps_done)
    optimizer = make_optimizer(model, settings.lr)
    model.train()
    step, lines, progress = 0, 0, 0.0
    with ctrl_c() as pressed:
        meter = Meter()
        start = time.perf_counter()
        while progress < 1 and not pressed:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(step, progress, settings.steps)
            inputs, targets = next_batch(domains, step, settings, generator)
            output = model(inputs)
            loss = task_loss(output.logits, targets)
            (loss + output.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            model.update(output.routings)

            step += 1
            elapsed = time.perf_counter() - start
            progress = how_far(step, elapsed, settings)
            meter.add(loss, output, targets.numel())
            if progress * LINES >= lines + 1 or pressed:
                lines = int(progress * LINES)
                print(meter.line(steps_done + step, elapsed), flush=True)
    return steps_done + step, bool(pressed)


def make_optimizer(model: ByteLM, lr: float) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay and leaves the norms' scales alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def how_far(step: int, elapsed: float, settings: Settings) -> float:
    """Share of the run that is over, by steps or by the clock, whichever is further."""
    by_steps = step / settings.steps if settings.steps else 0.0
    by_clock = elapsed / (60 * settings.minutes) if settings.minutes else 0.0
    return max(by_steps, by_clock)


def schedule(step: int, progress: float, steps: int | None) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine."""
    warm_up_steps = min(WARM_UP_STEPS, steps // 10) if steps else WARM_UP_STEPS
    warm_up = min(1.0, (step + 1) / (warm_up_steps + 1))
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def next_batch(
    domains: list[Tensor], step: int, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Windows at random places, the domains in turn; inputs and targets are [B, context]."""
    rows = settings.batch_tokens // settings.context
    windows = []
    for row in range(rows):
        data = domains[(step * rows + row) % len(domains)]
        start = int(torch.randint(len(data) - settings.context, (), generator=generator))
        windows.append(data[start : start + settings.context + 1])
    batch = torch.stack(windows).long()  # [B, context + 1]
    return batch[:, :-1], batch[:, 1:]


class Meter:
    """Sums what a progress line shows since the line before."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.last = 0.0
        self.clear()
        print("\nloss: bits per byte of training text; balance: 1 is even; dropped: over capacity")
        print("  step     loss  tokens/s  balance  dropped   time")

    def clear(self) -> None:
        """Forgets what was added."""
        self.steps = self.tokens = 0
        self.nats = self.balance = torch.zeros(())
        self.wanted = self.kept = torch.zeros((), dtype=torch.int64)

    def add(self, loss: Tensor, output: LMOutput, tokens: int) -> None:
        """Counts one optimizer step."""
        routings = output.routings
        balance = [routing.losses["load_balancing_loss"].detach() for routing in routings]
        self.steps += 1
        self.tokens += tokens
        self.nats = self.nats + loss.detach()
        self.balance = self.balance + torch.stack(balance).mean()
        self.wanted = self.wanted + sum(routing.tokens_per_expert.sum() for routing in routings)
        self.kept = self.kept + sum(routing.kept_per_expert.sum() for routing in routings)

    def line(self, step: int, elapsed: float) -> str:
        """One line for the time since the last, which starts anew."""
        loss = bits(float(self.nats) / self.steps)
        if not math.isfinite(loss):
            raise SettingsError(f"the loss is {loss} at step {step}: --lr must be lower")
        speed = self.tokens / (elapsed - self.last)
        balance = float(self.balance) / self.steps
        dropped = 1 - int(self.kept) / max(1, int(self.wanted))
        clock = f"{int(elapsed) // 60}:{int(elapsed) % 60:02d}"
        self.last = elapsed
        self.clear()
        return f"{step:6d}  {loss:7.4f}  {speed:8.0f}  {balance:7.4f}  {dropped:7.2%}  {clock:>5s}"


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C is pressed, so that the step at hand is finished first.

    Pressed again, Ctrl-C stops at once.
    """
    pressed: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def report(model: ByteLM, held_out: dict[str, Tensor], settings: Settings) -> None:
    """Prints the held-out loss of each domain and text that the model goes on with."""
    print(f"\nheld-out bits per byte ({HELD_OUT_WINDOWS} windows of {settings.context} bytes each)")
    losses = {name: held_out_loss(model, data, settings) for name, data in held_out.items()}
    width = max(len("mean"), *map(len, losses))
    for name, loss in [*losses.items(), ("mean", sum(losses.values()) / len(losses))]:
        print(f"  {name:{width}s}  {loss:.4f}")

    generator = torch.Generator().manual_seed(settings.seed)
    prompt_bytes = min(PROMPT_BYTES, settings.context)
    prompts = torch.stack([data[:prompt_bytes] for data in held_out.values()]).long()  # [D, S]
    texts = generate(model, prompts, SAMPLE_BYTES, TEMPERATURE, generator)  # [D, S + SAMPLE_BYTES]
    for name, text in zip(held_out, texts, strict=True):
        print(f"\nsample, {name} (held-out text up to the bar)")
        prompt, sample = readable(text[:prompt_bytes]), readable(text[prompt_bytes:])
        print("".join(f"  {line}\n" for line in f"{prompt}|{sample}".split("\n")), end="")


@torch.no_grad()
def held_out_loss(model: ByteLM, data: Tensor, settings: Settings) -> float:
    """Bits per byte over evenly spread windows; each starts with nothing known."""
    model.eval()
    last = len(data) - settings.context - 1
    starts = torch.linspace(0, last, HELD_OUT_WINDOWS).long()
    windows = torch.stack([data[s : s + settings.context + 1] for s in starts.tolist()]).long()
    total = 0.0
    for batch in torch.split(windows, settings.batch_tokens // settings.context):
        logits = model(batch[:, :-1]).logits  # [B, context, 256]
        total += float(task_loss(logits, batch[:, 1:])) * len(batch)
    return bits(total / HELD_OUT_WINDOWS)


def bits(nats: float) -> float:
    """The same amount of information in bits."""
    return nats / math.log(2)


def readable(data: Tensor) -> str:
    """The bytes as text that no terminal takes for a command."""
    text = bytes(data.tolist()).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


if __name__ == "__main__":
    sys.exit(main())

"""Records of a training run, and a screen to draw them on."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from rich.console import Console

from training.display import (
    LiveDisplay,
)
from training.metrics import EXPERT_FIELDS, Record

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
BARS = "▁▂▃▄▅▆▇█"
TITLE = re.compile(r"layer (\d+) +(\d+\.\d\d) to (\d+\.\d\d)")
LEFT_OUT = re.compile(r"layers left out: (\d+)")
PLAIN_LINE = re.compile(
    r"^ *(\d+)  +([\d.]+)  +(\d+)  +([\d.]+|-)  +([\d.]+%|-)  +([\d.]+%|-)  +([\d.]+|-)  +(\d+|-)"
    r"  +([\d:]+)$"
)


def record(step: int = 10, layers: int = 4, experts: int = 8, **values: object) -> Record:
    """A record whose experts take uneven shares."""
    draw = random.Random(step)
    load = []
    for _ in range(layers):
        weights = [draw.uniform(0.2, 1.8) for _ in range(experts)]
        total = sum(weights)
        load.append([weight / total for weight in weights])
    made = Record(
        step=step,
        seconds=0.5 * step,
        training_seconds=0.4 * step,
        bytes=1024 * step,
        loss=2.345,
        domain_loss={"python": 2.12, "english": 2.57, "cpp": 1.93},
        lr=0.001,
        gradient_norm=0.5,
        tokens_per_second=12345.6,
        balance=[1.25] * layers,
        max_violation=[0.875] * layers,
        dropped=[0.0321] * layers,
        rerouted=[0.1234] * layers,
        dead=[0] * layers,
        load=load,
    )
    return replace(made, **values)  # type: ignore[arg-type]


DENSE = record(**{name: [] for name in EXPERT_FIELDS})


@contextmanager
def screen(width: int = 80, height: int = 24, title: str = "title") -> Iterator[LiveDisplay]:
    """A display on a terminal of this size."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    with closing(LiveDisplay(title, console)) as live:
        yield live


def draw(
    *records: Record, share: float = 0.5, width: int = 80, height: int = 24, title: str = "title"
) -> list[str]:
    """The lines of the last of some records, as they are on the screen."""
    with screen(width, height, title) as live:
        for one in records:
            live.show(one, share)
        console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
        console.print(live.render(records[-1], share))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def written(live: LiveDisplay) -> str:
    assert isinstance(live.console.file, io.StringIO)
    return live.console.file.getvalue()

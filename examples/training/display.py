"""What a run shows while it trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from training.metrics import Record

LINES = 25  # plain lines per run
REFRESH_SECONDS = 0.5
DRAWING_SHARE = 0.005  # of the time, at most, goes into drawing
BLOCKS = " ▁▂▃▄▅▆▇█"
GAP = 2  # columns between two layers
BAR_WIDTHS = range(6, 0, -1)  # columns per expert, one of them empty where there are more
BAR_HEIGHTS = (8, 6, 4, 2, 1)  # lines; the even share ends at a whole or half line
BUSY = 1.5  # times the even share, from where a bar is shown in the second colour
USUAL_COLOUR, BUSY_COLOUR = "#56b4e9", "#e69f00"  # apart for colour-blind eyes too
NOTE = f"even share: half a bar; orange: {BUSY} times that or more"
LEFT_OUT = "; layers left out: {}"
CURVE_HEIGHT = 8  # lines at most
CURVE_MARGIN = 6  # columns for the scale
CURVE_TOP = 2.0  # times the least loss, where the curve is cut


class Display(Protocol):
    """Shows records and messages."""

    def show(self, record: Record, share: float) -> None:
        """A new record, when `share` of the run is over."""

    def message(self, text: str) -> None:
        """One line to stay."""

    def close(self) -> None:
        """The run is over."""


def make_display(title: str) -> Display:
    """A live display where there is a terminal that can draw it over and over, else plain lines."""
    console = Console(highlight=False)
    is_able = console.is_terminal and not (console.is_dumb_terminal or console.options.ascii_only)
    if sys.stdout.isatty() and is_able and not os.environ.get("NO_COLOR"):
        return LiveDisplay(title, console)
    return PlainDisplay()


class PlainDisplay:
    """A line now and then, each the mean of the records since the line before."""

    def __init__(self) -> None:
        """Prints the head of the table."""
        self.lines = 0
        self.pending: list[Record] = []
        print("\nloss: bits per byte of training text; balance: 1 is even; MaxVio: 0 is even")
        print("dropped, rerouted: slots over capacity; dead: experts that no byte chose")
        print("  step     loss  tokens/s  balance  dropped  rerouted  MaxVio  dead   time")

    def show(self, record: Record, share: float) -> None:
        """A line for each 1 / LINES of the run."""
        self.pending.append(record)
        if share * LINES >= self.lines + 1:
            self.lines = int(share * LINES)
            self.flush()

    def flush(self) -> None:
        """One line for the records since the last."""
        if not self.pending:
            return
        last = self.pending[-1]
        loss = mean([record.loss for record in self.pending])
        speed = mean([record.tokens_per_second for record in self.pending])
        experts = "      -        -         -       -     -"
        if last.load:
            balance, dropped, rerouted, max_violation = (
                mean([value for record in self.pending for value in getattr(record, name)])
                for name in ("balance", "dropped", "rerouted", "max_violation")
            )
            experts = (
                f"{balance:7.4f}  {dropped:7.2%}  {rerouted:8.2%}  {max_violation:6.3f}  "
                f"{dead(self.pending):4d}"
            )
        print(
            f"{last.step:6d}  {loss:7.4f}  {speed:8.0f}  {experts}  {clock(last.seconds):>5s}",
            flush=True,
        )
        self.pending.clear()

    def message(self, text: str) -> None:
        """One line."""
        print(text, flush=True)

    def close(self) -> None:
        """Prints what is left, such as the steps before Ctrl-C."""
        self.flush()


class LiveDisplay:
    """The state of the run in one place, drawn over itself as often as is cheap."""

    def __init__(self, title: str, console: Console) -> None:
        """Takes the screen's lower part."""
        self.title = title
        self.console = console
        self.losses: list[float] = []
        self.latest: tuple[Record, float] | None = None
        self.next_drawing = -math.inf
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self.live.start()

    def show(self, record: Record, share: float) -> None:
        """Draws the record, unless the last drawing is too fresh."""
        self.latest = record, share
        self.losses.append(record.loss)
        if time.monotonic() >= self.next_drawing:
            self.draw()

    def draw(self) -> None:
        """Draws the latest record."""
        begin = time.monotonic()
        if self.latest is not None:
            self.live.update(self.render(*self.latest), refresh=True)
        end = time.monotonic()
        self.next_drawing = end + max(REFRESH_SECONDS, (end - begin) / DRAWING_SHARE)

    def message(self, text: str) -> None:
        """One line above the display."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self.draw()
        self.live.stop()

    def render(self, record: Record, share: float) -> RenderableType:
        """The whole display, as high as the terminal has lines for."""
        width = self.console.width - 4  # inside the panel
        above = Group(time_line(record, share), progress_line(share, width), loss_line(record))
        below = numbers(record, width)
        note = NOTE + LEFT_OUT.format(len(record.load))  # as long as it can get
        options = self.console.options.update(width=width)
        lines = self.console.render_lines(Group(above, below, note), options)
        # The panel has two lines, and one stays free for the cursor.
        room = self.console.height - len(lines) - 3
        curve_height = max(1, min(CURVE_HEIGHT, room // 5))
        parts: list[RenderableType] = [above, curve(self.losses, width, curve_height), below]
        if record.load:
            parts.append(layers(record.load, width, room - curve_height))
        return Panel(Group(*parts), title=Text(self.title), title_align="left")


def time_line(record: Record, share: float) -> RenderableType:
    """How far the run is, by steps and by the clock."""
    left = f", about {clock(record.seconds * (1 - share) / share)} left" if share else ""
    line = Table.grid(expand=True, padding=(0, 1, 0, 0))
    line.add_column()
    line.add_column(justify="right")
    line.add_row(f"step {record.step:,}   {share:.0%}", f"{clock(record.seconds)} so far{left}")
    return line


def progress_line(share: float, width: int) -> Text:
    """The share as a line that fills."""
    done = round(width * min(1.0, share))
    return Text.assemble(("━" * done, USUAL_COLOUR), ("─" * (width - done), "dim"), no_wrap=True)


def loss_line(record: Record) -> Text:
    """The loss, and that of each domain."""
    line = Text.assemble("loss ", (f"{record.loss:.3f}", "bold"), " bits/byte")
    line.append("".join(f"   {name} {value:.2f}" for name, value in record.domain_loss.items()))
    return line


def numbers(record: Record, width: int) -> Text:
    """The speed, and where there are experts, how evenly they work and where slots went."""
    speed = f"{record.tokens_per_second:,.0f} bytes/s"
    if not record.load:
        return Text(speed)
    evenness = (
        speed,
        f"balance {mean(record.balance):.3f} (1 is even)",
        f"MaxVio {mean(record.max_violation):.2f} (0 is even)",
    )
    slots = (
        f"dropped {mean(record.dropped):.2%}",
        f"rerouted {mean(record.rerouted):.2%}",
        f"dead experts {sum(record.dead)} of {sum(map(len, record.load))}",
    )
    return Text("\n".join((*filled(evenness, width), *filled(slots, width))))


def filled(parts: Iterable[str], width: int) -> list[str]:
    """Lines with as many of the parts as they have room for; none is broken in two."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}   {part}" if lines else part
        if lines and len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


@dataclass(frozen=True)
class Layout:
    """How large the bars of a layer are, and what follows from that."""

    bar: int  # columns per expert
    rows: int  # lines per bar
    numbered: bool  # whether the experts' numbers are below
    experts: int
    title: int  # columns of the longest title
    width: int  # columns there are

    @property
    def body(self) -> int:
        """Columns of an expert that are not empty."""
        return max(1, self.bar - 1)

    @property
    def per_line(self) -> int:
        """Experts side by side."""
        return max(1, self.width // self.bar)

    @property
    def columns(self) -> int:
        """Layers side by side."""
        cell = max(self.title, self.bar * min(self.experts, self.per_line))
        return max(1, (self.width + GAP) // (cell + GAP))

    @property
    def height(self) -> int:
        """Lines of a layer: title, bars, numbers."""
        return 1 + (self.rows + self.numbered) * math.ceil(self.experts / self.per_line)

    @property
    def is_readable(self) -> bool:
        """Whether numbers stay apart, and a layer in one line where narrow bars allow for that."""
        are_apart = not self.numbered or len(str(self.experts - 1)) < self.bar
        return are_apart and (self.bar == 1 or self.experts <= self.per_line)

    def fits(self, layers: int, room: int) -> bool:
        """Whether all layers can be shown in `room` lines."""
        return math.ceil(layers / self.columns) * self.height <= room


def layers(load: list[list[float]], width: int, room: int) -> RenderableType:
    """A bar per expert per layer, as large as there is room for; the last layers may not fit."""
    relative = [[share * len(shares) for share in shares] for shares in load]
    titles = [
        f"layer {layer}  {min(values):.2f} to {max(values):.2f}"
        for layer, values in enumerate(relative)
    ]
    layout = choose_layout(len(load), len(load[0]), max(map(len, titles)), width, room)
    shown = min(len(load), max(0, room) // layout.height * layout.columns)
    cells = [
        Text.assemble((title, "bold"), bars(values, layout), no_wrap=True)
        for title, values in zip(titles[:shown], relative, strict=False)
    ]
    grid = Table.grid(padding=(0, GAP, 0, 0))
    for start in range(0, shown, layout.columns):
        grid.add_row(*cells[start : start + layout.columns])
    note = NOTE if shown == len(load) else f"{NOTE}{LEFT_OUT.format(len(load) - shown)}"
    return Group(grid, Text(note, style="dim"))


def choose_layout(layers: int, experts: int, title: int, width: int, room: int) -> Layout:
    """The largest bars with which all layers fit, else the smallest, else titles alone."""
    layouts = [
        Layout(bar, rows, numbered, experts, title, width)
        for bar, rows, numbered in product(BAR_WIDTHS, BAR_HEIGHTS, (True, False))
    ]
    fitting = [layout for layout in layouts if layout.is_readable and layout.fits(layers, room)]
    if fitting:
        return max(fitting, key=lambda one: (one.bar * one.rows, one.numbered, one.rows))
    smallest = layouts[-1]
    return smallest if smallest.height <= room else Layout(1, 0, False, 0, title, width)


def bars(values: list[float], layout: Layout) -> Text:
    """One layer: its experts' load over the even share, in bars that end at twice that."""
    text = Text()
    for start in range(0, len(values), layout.per_line):
        part = values[start : start + layout.per_line]
        for row in reversed(range(layout.rows)):
            text.append("\n")
            line = " underline" if 2 * row == layout.rows else ""  # at the even share
            for is_busy, alike in groupby(part, lambda value: value >= BUSY):
                blocks = [  # only what is idle looks so
                    block(value * layout.rows / 2 - row, least=int(row == 0 and value > 0))
                    for value in alike
                ]
                run = "".join((one * layout.body).ljust(layout.bar) for one in blocks)
                text.append(run, style=(BUSY_COLOUR if is_busy else USUAL_COLOUR) + line)
        if layout.numbered:
            numbers = (f"{start + n:^{layout.body}d}".ljust(layout.bar) for n in range(len(part)))
            text.append("\n" + "".join(numbers), style="dim")
    return text


def curve(losses: list[float], width: int, height: int) -> Text:
    """The losses since the start, their mean in each column; the scale where there is room."""
    margin = CURVE_MARGIN if height > 1 else 0
    columns = max(1, min(width - margin, len(losses)))
    cuts = [len(losses) * column // columns for column in range(columns + 1)]
    means = [mean(losses[a:b]) for a, b in pairwise(cuts)]
    low = min(means)
    high = min(max(means), CURVE_TOP * low)
    scale = height / (high - low) if high > low else 0.0
    text = Text(no_wrap=True)
    for row in reversed(range(height)):
        ends = {height - 1: f"{high:.2f} ", 0: f"{low:.2f} "} if margin else {}
        text.append(ends.get(row, "").rjust(margin), style="dim")
        line = "".join(block((value - low) * scale - row, int(row == 0)) for value in means)
        text.append(line + "\n" * (row > 0), style=USUAL_COLOUR)
    return text


def block(height: float, least: int) -> str:
    """The block that is as high as `height`, from 0 to 1, or `least` eighths."""
    return BLOCKS[max(least, round(8 * min(1.0, max(0.0, height))))]


def dead(records: list[Record]) -> int:
    """How many experts no slot chose in any of the records, in all layers."""
    loads = zip(*(record.load for record in records), strict=True)  # by layer
    return sum(not any(shares) for layer in loads for shares in zip(*layer, strict=True))


def mean(values: list[float]) -> float:
    """The average; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

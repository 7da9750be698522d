"""The table that `Watcher.summary` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from torchmoe.monitor._history import Record

_COLUMNS = (
    "layer",
    "dropped",
    "re-\nrouted",
    "MaxVio",
    "load\nCV",
    "load\nentropy",
    "routing\nentropy",
    "dead\nexperts",
    "first\nweight",
    "logit\nrange",
    "passes",
)
# What a narrow terminal does without, in this order.
_LESS_IMPORTANT = (
    "load\nCV",
    "logit\nrange",
    "first\nweight",
    "routing\nentropy",
    "passes",
    "load\nentropy",
)
_CAPTION = """
means over the passes; dropped, rerouted: share of the chosen slots;
MaxVio: largest load / mean - 1; load entropy: share of log E; routing entropy: nats"""
_WIDE = 1000  # columns, more than any table has


def print_table(layers: Mapping[str, Record | None]) -> None:
    """Prints a row for each layer; None is a layer without a forward pass.

    A terminal too narrow for all columns gets those that it has room for.
    """
    console = Console()
    rows = [(name, *_cells(record)) for name, record in layers.items()]
    columns = [*_COLUMNS]
    table = _table(rows, columns)
    wide = console.options.update(width=_WIDE)
    for column in _LESS_IMPORTANT:
        if not console.is_terminal or console.measure(table, options=wide).maximum <= console.width:
            break
        columns.remove(column)
        table = _table(rows, columns)
    if not console.is_terminal:
        # A file has no width to keep to, but rich takes it for 80 columns.
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    left_out = [column.replace("\n", " ") for column in _COLUMNS if column not in columns]
    if left_out:
        console.print(f"no room for {', '.join(left_out)}", style="dim", highlight=False)


def _table(rows: Iterable[Sequence[str]], columns: Sequence[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        caption=_CAPTION,
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        # The name of a layer would be cut first, and the rows could not be told apart.
        is_name = column == "layer"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        by_column = dict(zip(_COLUMNS, row, strict=True))
        table.add_row(*(by_column[column] for column in columns))
    return table


def _cells(record: Record | None) -> list[str]:
    if record is None:
        return ["-"] * (len(_COLUMNS) - 2) + ["0"]
    statistics = record.statistics()
    num_experts = len(statistics.tokens_per_expert)
    even = math.log(num_experts)
    return [
        f"{statistics.dropped_share.item():.1%}",
        f"{statistics.rerouted_share.item():.1%}",
        f"{statistics.max_violation.item():.2f}",
        f"{statistics.load_cv.item():.2f}",
        f"{statistics.load_entropy.item() / even:.1%}" if even else "-",
        f"{statistics.routing_entropy.item():.2f}",
        f"{statistics.dead_experts.item():.1f}/{num_experts}",
        f"{statistics.first_choice_weight.item():.2f}",
        f"{statistics.logit_range.item():.1f}",
        str(record.forwards),
    ]

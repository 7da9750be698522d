"""The live display of a training run."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from lm_records import (
    BARS,
    DENSE,
    HIDE_CURSOR,
    LEFT_OUT,
    SHOW_CURSOR,
    TITLE,
    draw,
    record,
    screen,
    written,
)
from training import display
from training.display import (
    BUSY_COLOUR,
    REFRESH_SECONDS,
    USUAL_COLOUR,
    Layout,
)

# ---- the live display


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("experts", [1, 2, 8, 16, 64, 200])
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_shows_every_number_and_every_expert(
    width: int, experts: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[float], list[str]]] = []

    def bars(values: list[float], layout: Layout) -> Text:
        text = display_bars(values, layout)
        drawn.append((values, text.plain.split("\n")[1:]))
        return text

    display_bars = display.bars
    monkeypatch.setattr(display, "bars", bars)
    one = record(layers=layers, experts=experts)
    lines = draw(one, width=width, height=400)
    text = re.sub(" +", " ", " ".join(line[2:-2] for line in lines))
    for part in (
        "step 10 50%",
        "0:05 so far, about 0:05 left",
        "loss 2.345 bits/byte",
        "python 2.12",
        "english 2.57",
        "cpp 1.93",
        "12,346 bytes/s",
        "balance 1.250 (1 is even)",
        "dropped 3.21%",
        "rerouted 12.34%",
        "MaxVio 0.88 (0 is even)",
        f"dead experts 0 of {layers * experts}",
        "even share: half a bar; orange: 1.5 times that or more ",
    ):
        assert part in text
    # Each layer's bars are below its title; test_bars_are_as_high_as_the_load looks at them.
    titles = {
        int(match[1]): (number, match.start(), match.groups()[1:])
        for number, line in enumerate(lines)
        for match in TITLE.finditer(line)
    }
    for layer, (values, cell) in enumerate(drawn[-layers:]):  # of the last time
        assert values == [share * experts for share in one.load[layer]]
        number, column, ends = titles[layer]
        assert ends == (f"{min(values):.2f}", f"{max(values):.2f}")
        below = [line[column:] for line in lines[number + 1 :]]
        assert all(line.startswith(part) for line, part in zip(below, cell, strict=False))
        assert len(below) > len(cell) > 0


@pytest.mark.parametrize("height", [5, 12, 24, 40])
@pytest.mark.parametrize("width", [20, 40, 80, 100, 300])
@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 2), (4, 8), (12, 8), (6, 64), (12, 200), (32, 3000)]
)
def test_is_no_larger_than_the_terminal(width: int, height: int, layers: int, experts: int) -> None:
    lines = draw(record(layers=layers, experts=experts), width=width, height=height)
    assert {len(line) for line in lines} == {width}
    if width >= 40 and height >= 24:
        assert len(lines) < height
        text = re.sub(" +", " ", " ".join(line[2:-2] for line in lines))
        left_out = LEFT_OUT.search(text)
        assert len(TITLE.findall(text)) + (int(left_out[1]) if left_out else 0) == layers


@pytest.mark.parametrize(
    ("layers", "experts", "height", "left_out"),
    [
        (4, 8, 24, 0),
        (12, 8, 24, 0),
        (6, 64, 24, 0),
        (12, 64, 24, 6),
        (12, 64, 40, 0),
        (12, 200, 24, 9),
        (12, 3000, 24, 0),  # titles alone
    ],
)
def test_layers_that_fit(layers: int, experts: int, height: int, left_out: int) -> None:
    text = "\n".join(draw(record(layers=layers, experts=experts), height=height))
    assert [int(number) for number, _, _ in TITLE.findall(text)] == [*range(layers - left_out)]
    assert LEFT_OUT.findall(text) == ([str(left_out)] if left_out else [])


def test_wide_bars_stay_in_one_line() -> None:
    # There is room for three lines of wide bars in each layer, which nobody could compare.
    lines = draw(record(layers=6, experts=64), width=100, height=40)
    assert sum(bool(TITLE.search(line)) for line in lines) == 6
    assert max(len(run) for line in lines[12:] for run in re.findall(f"[{BARS}]+", line)) == 64


def test_a_low_terminal_leaves_all_layers_out() -> None:
    text = "\n".join(draw(record(layers=4, experts=8), height=6))
    assert not TITLE.search(text)
    assert LEFT_OUT.findall(text) == ["4"]


def test_a_class_sees_this() -> None:
    losses = [record(n, loss=2.0 + 6.0 / n) for n in range(1, 69)]
    last = record(
        step=1600, dead=[0, 1], load=[[0.125] * 8, [0.25, 0.25, 0.0, 0.001, *[0.12475] * 4]]
    )
    lines = draw(*losses, last, title="runs/lm")
    assert lines[0] == f"╭─ runs/lm {'─' * 68}╮"
    assert lines[-1] == f"╰{'─' * 78}╯"
    assert [line[2:-2].rstrip() for line in lines[1:-1]] == [
        "step 1,600   50%                              13:20 so far, about 13:20 left",
        "━" * 38 + "─" * 38,
        "loss 2.345 bits/byte   python 2.12   english 2.57   cpp 1.93",
        " 4.18 ██▆",
        "      ████▅▂▁",
        " 2.09 ████████▇▆▅▅▄▄▄▃▃▃▃▂▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▃",
        "12,346 bytes/s   balance 1.250 (1 is even)   MaxVio 0.88 (0 is even)",
        "dropped 3.21%   rerouted 12.34%   dead experts 1 of 16",
        "layer 0  1.00 to 1.00             layer 1  0.00 to 2.00",
        "                                  ███ ███",
        "                                  ███ ███",
        "                                  ███ ███",
        "                                  ███ ███",
        "███ ███ ███ ███ ███ ███ ███ ███   ███ ███         ███ ███ ███ ███",
        "███ ███ ███ ███ ███ ███ ███ ███   ███ ███         ███ ███ ███ ███",
        "███ ███ ███ ███ ███ ███ ███ ███   ███ ███         ███ ███ ███ ███",
        "███ ███ ███ ███ ███ ███ ███ ███   ███ ███     ▁▁▁ ███ ███ ███ ███",
        " 0   1   2   3   4   5   6   7     0   1   2   3   4   5   6   7",
        "even share: half a bar; orange: 1.5 times that or more",
    ]


def test_dense_record_has_no_experts() -> None:
    text = "\n".join(draw(DENSE))
    assert "loss 2.345" in text
    assert "12,346 bytes/s" in text
    for word in ("balance", "dropped", "rerouted", "MaxVio", "dead", "layer", "share", "nan"):
        assert word not in text


def test_first_record_at_share_zero() -> None:
    text = "\n".join(draw(record(), share=0.0))
    assert "0%" in text
    assert "left" not in text  # nobody knows


@pytest.mark.parametrize("title", ["[/x] ['a', 'b'] [bold]", "x" * 500])
def test_title_is_shown_as_it_is(title: str) -> None:
    lines = draw(record(), title=title)
    assert title[:40] in lines[0]
    assert len(lines[0]) == 80


def test_many_domains_take_room_from_the_experts() -> None:
    domains = {f"domain-{number}": 1.0 for number in range(20)}
    lines = draw(record(domain_loss=domains))
    assert len(lines) < 24
    assert all(name in "\n".join(lines) for name in domains)


def test_draws_no_more_often_than_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now))
    drawn = []
    with screen() as live:
        update = live.live.update
        monkeypatch.setattr(
            live.live, "update", lambda *a, **k: (drawn.append(now), update(*a, **k))
        )
        for number in range(100):
            now = number / 10
            live.show(record(number + 1), number / 100)
    assert drawn[0] == 0.0
    gaps = [b - a for a, b in pairwise(drawn[:-1])]
    assert gaps == pytest.approx([REFRESH_SECONDS] * 19)
    assert len(live.losses) == 100


def test_close_leaves_the_last_state_and_a_clean_terminal() -> None:
    stdout, stderr = sys.stdout, sys.stderr
    with screen() as live:
        live.show(record(10), 0.1)
        live.show(record(20), 0.2)  # too soon to be drawn
        assert "step 20" not in written(live)
    output = written(live)
    assert "step 20" in output
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 1
    assert output.index(HIDE_CURSOR) < output.index("step 10") < output.index(SHOW_CURSOR)
    assert output.replace(SHOW_CURSOR, "").endswith("\n")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_terminal_is_clean_after_an_error_too() -> None:
    stdout = sys.stdout
    with pytest.raises(KeyboardInterrupt), screen() as live:
        raise KeyboardInterrupt
    assert written(live).count(HIDE_CURSOR) == written(live).count(SHOW_CURSOR) == 1
    assert sys.stdout is stdout


def test_message_stays_above() -> None:
    with screen() as live:
        live.show(record(10), 0.1)
        before = len(written(live))
        live.message("warning: [/x] " + "long " * 30)
        output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(live)[before:])
    assert "warning: [/x] " + "long " * 30 in output  # one line, however long
    assert output.index("warning") < output.index("step 10")


# ---- its parts


@given(
    values=st.lists(st.floats(0, 3), min_size=1, max_size=40),
    bar=st.sampled_from(display.BAR_WIDTHS),
    rows=st.sampled_from(display.BAR_HEIGHTS),
    numbered=st.booleans(),
    width=st.integers(6, 60),
)
def test_bars_are_as_high_as_the_load(
    values: list[float], bar: int, rows: int, numbered: bool, width: int
) -> None:
    numbered = numbered and len(str(len(values) - 1)) < bar
    layout = Layout(bar, rows, numbered, len(values), 0, width)
    empty, *lines = display.bars(values, layout).plain.split("\n")
    assert empty == ""  # comes after the title
    assert len(lines) == layout.height - 1
    assert all(len(line) <= width for line in lines)
    step = rows + numbered
    for expert, value in enumerate(values):
        part, column = divmod(expert, width // bar)
        cells = [line[bar * column : bar * (column + 1)] for line in lines[part * step :]][:step]
        assert not numbered or cells[-1].split() == [str(expert)]
        eighths = 0
        for above, cell in zip([" ", *cells], cells[:rows], strict=False):
            assert cell.rstrip() == cell[0] * len(cell.rstrip())
            assert cell[0] == " " or len(cell.rstrip()) == max(1, bar - 1)
            assert above[0] == " " or cell[0] == "█"
            eighths += (" " + BARS).index(cell[0])
        assert eighths / 8 == pytest.approx(min(value, 2.0) * rows / 2, abs=1 / 16 + 1e-9) or (
            eighths == 1 and value > 0 and value * rows / 2 < 1 / 16
        )
        assert (eighths == 0) == (value == 0)


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 10, 64, 200])
@pytest.mark.parametrize("rows", display.BAR_HEIGHTS)
def test_even_share_fills_the_lower_half(experts: int, rows: int) -> None:
    share = float(torch.tensor(1.0) / experts)  # as a record has it, rounded to float32
    text = display.bars([share * experts] * experts, Layout(1, rows, False, experts, 0, 300))
    lines = text.plain.split("\n")[1:]
    if rows == 1:
        assert lines == ["▄" * experts]
    else:
        assert lines == [" " * experts] * (rows // 2) + ["█" * experts] * (rows // 2)


def test_bars_of_busy_experts_have_another_colour() -> None:
    values = [1.0, 1.49, 1.5, 0.0, 3.0]
    text = display.bars(values, Layout(2, 2, False, 5, 0, 80))
    console = Console(color_system="truecolor")
    lower = text.plain.rindex("\n") + 1
    colours = [text.get_style_at_offset(console, lower + 2 * n).color for n in range(5)]
    assert [colour.name for colour in colours if colour] == [
        *(USUAL_COLOUR, USUAL_COLOUR, BUSY_COLOUR, USUAL_COLOUR, BUSY_COLOUR)
    ]


@pytest.mark.parametrize("rows", [2, 4, 6, 8])
def test_a_line_marks_the_even_share(rows: int) -> None:
    text = display.bars([1.0, 2.0, 0.5], Layout(3, rows, True, 3, 0, 80))
    console = Console()
    starts = [match.end() for match in re.finditer("\n", text.plain)]
    marked = [text.get_style_at_offset(console, start).underline for start in starts]
    assert marked.index(True) == rows // 2 - 1  # at the lower end of this line
    assert marked.count(True) == 1


def test_curve_is_the_mean_in_each_column() -> None:
    losses = [3.0] * 10 + [2.0] * 10 + [2.5] * 10
    assert display.curve(losses, 3, 1).plain == "█▁▄"
    assert display.curve(losses, 30, 1).plain == "█" * 10 + "▁" * 10 + "▄" * 10
    assert display.curve(losses, 100, 1).plain == "█" * 10 + "▁" * 10 + "▄" * 10


def test_curve_has_a_scale_where_it_is_high() -> None:
    curve = display.curve([3.0, 2.5, 2.0], 20, 4).plain
    assert curve.split("\n") == [" 3.00 █  ", "      █  ", "      ██ ", " 2.00 ██▁"]


def test_curve_is_cut_at_twice_the_least_loss() -> None:
    curve = display.curve([8.0, 4.0, 3.0, 2.0], 20, 2).plain
    assert curve.split("\n") == [" 4.00 ██  ", " 2.00 ███▁"]


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [0.0]])
@pytest.mark.parametrize("height", [1, 3])
def test_curve_without_ups_and_downs_is_flat(losses: list[float], height: int) -> None:
    last = display.curve(losses, 20, height).plain.split("\n")[-1]
    assert last.split()[-1] == "▁" * len(losses)


def test_numbers_stay_whole_where_a_line_ends() -> None:
    parts = ["balance 1", "MaxVio 0.5 (0 is even)", "dropped 3%", "rerouted 1%"]
    assert display.filled(parts, 30) == [
        *("balance 1", "MaxVio 0.5 (0 is even)", "dropped 3%   rerouted 1%")
    ]
    assert display.filled(parts, 34)[0] == "balance 1   MaxVio 0.5 (0 is even)"
    assert display.filled(parts, 5) == parts


@pytest.mark.parametrize(("share", "done"), [(0.0, 0), (0.25, 5), (1.0, 20), (1.3, 20)])
def test_progress_line(share: float, done: int) -> None:
    assert display.progress_line(share, 20).plain == "━" * done + "─" * (20 - done)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (60, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (1e6, "277:46:40"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert display.clock(seconds) == text

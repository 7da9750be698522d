"""What a training run prints where no terminal is, and which display a run gets."""

from __future__ import annotations

import io
import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from lm_records import (
    DENSE,
    PLAIN_LINE,
    record,
)
from training.display import (
    LINES,
    LiveDisplay,
    PlainDisplay,
    make_display,
)

# ---- plain lines


@pytest.fixture
def plain(capsys: pytest.CaptureFixture[str]) -> PlainDisplay:
    plain = PlainDisplay()
    assert capsys.readouterr().out.endswith(
        "\n  step     loss  tokens/s  balance  dropped  rerouted  MaxVio  dead   time\n"
    )
    return plain


@pytest.mark.parametrize("records", [25, 26, 40, 100, 320, 1000])
def test_plain_lines_are_so_many(
    records: int, plain: PlainDisplay, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(1, records + 1):
        plain.show(record(n), n / records)
    plain.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == LINES
    assert all(PLAIN_LINE.match(line) for line in lines)
    steps = [int(line.split()[0]) for line in lines]
    assert steps == [-(-records * n // LINES) for n in range(1, LINES + 1)]


def test_plain_lines_show_each_record_of_a_short_run(
    plain: PlainDisplay, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(1, 4):
        plain.show(record(n), n / 3)
    plain.close()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_plain_line_is_the_mean_since_the_line_before(
    plain: PlainDisplay, capsys: pytest.CaptureFixture[str]
) -> None:
    plain.show(record(10, loss=9.0), 0.05)
    capsys.readouterr()
    values: dict[str, list[Any]] = {
        "balance": [1.0, 1.5],
        "max_violation": [1.0, 2.0],
        "dropped": [0.0, 0.5],
        "rerouted": [0.0, 0.25],
        "load": [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]],
        "dead": [1, 2],
    }
    plain.show(record(20, loss=2.0, tokens_per_second=100.0, **values), 0.06)
    assert capsys.readouterr().out == ""
    values = {
        "balance": [2.0, 2.5],
        "max_violation": [0.5, 0.75],
        "dropped": [0.25, 0.25],
        "rerouted": [0.5, 0.0],
        "load": [[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]],
        "dead": [2, 1],
    }
    plain.show(record(30, loss=3.0, tokens_per_second=300.0, seconds=83.9, **values), 0.09)
    assert capsys.readouterr().out == (
        "    30   2.5000       200   1.7500   25.00%    18.75%   1.062     2   1:23\n"
    )  # one expert of each layer took nothing in both records


def test_plain_line_of_a_dense_model(
    plain: PlainDisplay, capsys: pytest.CaptureFixture[str]
) -> None:
    plain.show(replace(DENSE, seconds=3725.0), 1.0)
    assert capsys.readouterr().out == (
        "    10   2.3450     12346        -        -         -       -     -  1:02:05\n"
    )


def test_plain_close_prints_what_is_left(
    plain: PlainDisplay, capsys: pytest.CaptureFixture[str]
) -> None:
    plain.show(record(10), 0.01)
    assert capsys.readouterr().out == ""
    plain.close()
    assert PLAIN_LINE.match(capsys.readouterr().out.rstrip("\n"))
    plain.close()
    assert capsys.readouterr().out == ""


def test_plain_message_is_a_line(plain: PlainDisplay, capsys: pytest.CaptureFixture[str]) -> None:
    plain.message("[bold]hello[/x]")
    assert capsys.readouterr().out == "[bold]hello[/x]\n"


# ---- which one


class Stream(io.TextIOWrapper):
    """A standard output that may be a terminal."""

    def __init__(self, is_terminal: bool, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "encoding", "environment", "kind"),
    [
        (True, "utf-8", {}, LiveDisplay),
        (True, "utf-8", {"NO_COLOR": ""}, LiveDisplay),  # counts as not set
        (True, "utf-8", {"NO_COLOR": "1"}, PlainDisplay),
        (True, "utf-8", {"TERM": "dumb"}, PlainDisplay),
        (True, "utf-8", {"TTY_COMPATIBLE": "0"}, PlainDisplay),
        (True, "latin-1", {}, PlainDisplay),  # it has no blocks
        (False, "utf-8", {}, PlainDisplay),
        (False, "utf-8", {"FORCE_COLOR": "1"}, PlainDisplay),
    ],
)
def test_make_display(
    is_terminal: bool,
    encoding: str,
    environment: dict[str, str],
    kind: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Stream(is_terminal, encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with closing(make_display("title")) as made:
        assert type(made) is kind
        made.show(record(), 0.5)
    stream.flush()
    output = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert ("\x1b" in output) == (kind is LiveDisplay)
    assert "2.345" in output
